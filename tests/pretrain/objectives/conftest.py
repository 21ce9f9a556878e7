"""Small assemblies with something in their queues."""

import pytest
import torch

from tests.pretrain.model.references import enter, move_ema


@pytest.fixture
def make(make_model):
    """make("moco", method="nn", ..): EMA networks that differ, queues that hold something."""

    def make(objective, *, options=None, num_entries=40, **fa):
        options = {"num_prototypes": 6, "num_negatives": 20} | (options or {})
        model = make_model(objective, objective_options=options, **fa)
        if model.ema is not None:
            move_ema(model)
        if model.queue is not None:
            model.queue.put(torch.randn(num_entries, 12))
        enter(model, torch.randn(2, 16, 12))
        return model

    return make
