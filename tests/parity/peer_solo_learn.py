"""What solo-learn's own classes train; run by test_solo_learn.py in their own environment.

usage: peer_solo_learn.py INPUTS.pth OUTPUTS.pth
"""

import sys
from unittest import mock

import omegaconf  # type: ignore  # only in the peer's environment
import torch
from solo.methods.barlow_twins import BarlowTwins  # type: ignore
from solo.methods.base import BaseMethod  # type: ignore
from solo.methods.deepclusterv2 import DeepClusterV2  # type: ignore
from solo.methods.vicreg import VICReg  # type: ignore
from tiny_network import TinyNetwork  # type: ignore  # beside this script

CLASSES = {"barlow": BarlowTwins, "vicreg": VICReg, "deepclusterv2": DeepClusterV2}


class Loader(list):
    """Batches of an epoch, and how many samples there are."""

    dataset: range


def make(name, case):
    config = {
        "method": name,
        "backbone": {"name": "resnet18"},
        "data": {
            "dataset": "custom", "num_classes": 2, "num_large_crops": 2, "num_small_crops": 0,
        },
        "max_epochs": len(case["orders"]),
        "optimizer": {
            "name": "sgd", "batch_size": case["views"].shape[2], "lr": 1.0, "weight_decay": 0.0,
            "classifier_lr": 0.0,
        },
        "scheduler": {"name": "none"},
        "method_kwargs": case["method_kwargs"],
    }  # fmt: skip
    with mock.patch.dict(BaseMethod._BACKBONES, resnet18=lambda method: TinyNetwork()):
        model = CLASSES[name](omegaconf.OmegaConf.create(config))
    # Linear layers before a BN have a bias there, which the BN removes again.
    state = model.state_dict()
    state |= {key: torch.zeros_like(v) for key, v in state.items() if key.startswith("projector.")}
    model.load_state_dict(state | case["weights"])
    return model


def train(name, case):
    """SGD on their training step: losses, final weights, and what DeepCluster-v2 keeps."""
    model, losses, logged = make(name, case), [], {}
    model.log = lambda key, value, **_: logged.update({key: value})
    model.log_dict = lambda *_, **__: None
    parts = [*model.backbone.parameters(), *model.projector.parameters()]
    optimizer = torch.optim.SGD(parts, **case["sgd"])
    batches = iter(case["views"])
    trainer = mock.Mock(world_size=1, global_rank=0, current_epoch=0)
    trainer.train_dataloader = Loader(case["orders"][0])
    trainer.train_dataloader.dataset = range(case["orders"][0].numel())
    model._trainer = trainer
    model.on_train_start()
    for trainer.current_epoch, order in enumerate(case["orders"]):
        starts = iter(case["starts"][trainer.current_epoch])

        def drawn(_, starts=starts):
            """The rows to start from, given as samples; the bank is in the order of the epoch."""
            return model.local_memory_index.argsort()[next(starts)]

        with mock.patch("solo.utils.kmeans.torch.randperm", drawn):
            model.on_train_epoch_start()
        for number, ids in enumerate(order):
            views = next(batches)
            targets = torch.zeros(len(ids), dtype=torch.int64)
            loss = model.training_step([ids, list(views), targets], number)
            (own,) = (value for key, value in logged.items() if key.endswith(f"{case['log']}_loss"))
            losses.append(own.detach())
            # Without any cluster the mean over no rows is not a number: nothing is learnt.
            if name != "deepclusterv2" or trainer.current_epoch > 0:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    results = {"losses": torch.stack(losses)}
    if name == "deepclusterv2":
        results["centroids"] = torch.stack([p.weight.data for p in model.prototypes])
        results["assignments"] = model.assignments
    return results | {f"weights.{key}": value for key, value in model.state_dict().items()}


def main(inputs, outputs):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    cases = torch.load(inputs, weights_only=True)
    torch.save({name: train(name, case) for name, case in cases.items()}, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
