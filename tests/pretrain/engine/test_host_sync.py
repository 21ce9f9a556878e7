"""A step never makes the host wait for the device, but where docs/running.md says so."""

import pytest
import torch

from tests.pretrain.engine.run_helpers import LIGHT, SMALL
from tests.pretrain.engine.sync_counter import counted_syncs

BASE = (
    SMALL
    | LIGHT
    | {
        "optim": SMALL["optim"] | {"epochs": 4},
        "engine": {"log_every_steps": 1000, "num_threads": 1, "watchdog_seconds": 0},
    }
)
NUM_STEPS = 3  # the queue holds 16 entries before the third
CASES = {
    **{name: [f"objective.name={name}"] for name in ("byol", "simclr")},
    "moco": ["objective.name=moco", "objective.num_negatives=20"],
    "swav": ["objective.name=swav", "objective.num_prototypes=6"],
    "barlow": ["objective.name=barlow"],
    "vicreg": ["objective.name=vicreg"],
    "deepclusterv2": ["objective.name=deepclusterv2", "objective.num_prototypes=6"],
    "infonce": ["objective.name=infonce", "optim.name=adamw"],
    "partners": ["fa.method=mixup|cutmix", "fa.partner=batch"],
    "queue": ["fa.method=extrapolate", "fa.partner=queue", "fa.num_features=2"],
    "draws": ["fa.method=nn+noise|mask", "fa.nn.top_k=4"],
    "consensus": ["fa.nn.top_k=4", "fa.nn.choice=consensus", "fa.nn.distance=truncated"],
    "plain": ["optim.micro_batch_size=4"],
    "cached": ["optim.micro_batch_size=4", "optim.accumulation=cached", "heads.dropout=0.1"],
    "probe": ["eval.online_probe=true"],
}


@pytest.fixture
def on_cpu(make_run):
    """A run on the CPU whose guard looks as seldom as on a GPU."""

    def make(*overrides):
        run = make_run("engine.device=cpu", "engine.precision=fp32", *overrides)
        run.task.guard._is_always_due = False
        return run

    return make


@pytest.mark.parametrize("case", CASES)
def test_plain_steps_read_nothing_to_the_host(on_cpu, case):
    run = on_cpu(*CASES[case])
    batches = list(run.batches.epoch(0))[:NUM_STEPS]
    with counted_syncs() as counter:
        for batch in batches:
            run.step(batch)
    assert counter.places == []
    if run.task.model.queue is not None:
        assert run.task.model.augmenter.is_ready()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_plain_steps_do_not_wait_for_the_gpu(make_run, case):
    run = make_run("engine.device=cuda", *CASES[case])
    for batch in list(run.batches.epoch(0))[:NUM_STEPS]:  # cuDNN's and NCCL's first calls may wait
        run.step(batch)
    batches = list(run.batches.epoch(1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            run.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
