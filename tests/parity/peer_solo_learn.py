"""What solo-learn's own classes train; run by test_solo_learn.py in their own environment.

usage: peer_solo_learn.py INPUTS.pth OUTPUTS.pth
"""

import sys
from unittest import mock

import omegaconf  # type: ignore  # only in the peer's environment
import torch
from solo.methods import METHODS  # type: ignore
from solo.methods.base import BaseMethod  # type: ignore
from tiny_network import TinyNetwork  # type: ignore  # beside this script


class Loader(list):
    """Batches of an epoch, and how many samples there are."""

    dataset: range


def make(case):
    config = {
        "method": case["method"],
        "backbone": {"name": "resnet18"},
        "data": {
            "dataset": "custom", "num_classes": 2, "num_large_crops": 2,
            "num_small_crops": len(case["small_crops"][0]),
        },
        "max_epochs": len(case["orders"]),
        "optimizer": {
            "name": "sgd", "batch_size": case["views"].shape[2], "weight_decay": 0.0,
            "classifier_lr": 0.0, "lr": case["lr"], "kwargs": {"momentum": case["sgd_momentum"]},
        },
        "scheduler": {"name": "none"},
        "momentum": case["momentum"],
        "method_kwargs": case["method_kwargs"],
    }  # fmt: skip
    with mock.patch.dict(BaseMethod._BACKBONES, resnet18=lambda method: TinyNetwork()):
        model = METHODS[case["method"]](omegaconf.OmegaConf.create(config))
    # Linear layers before a BN have a bias there, which the BN removes again.
    heads, state = ("projector.", "momentum_projector.", "predictor."), model.state_dict()
    state |= {key: torch.zeros_like(v) for key, v in state.items() if key.startswith(heads)}
    model.load_state_dict(state | case["weights"])
    return model


def train(case):
    """Their training steps and hooks: losses, and the state after each step."""
    model, losses, states, logged = make(case), [], [], {}
    model.log = lambda key, value, **_: logged.update({key: value})
    model.log_dict = lambda values, **_: logged.update(values)
    optimizer = model.configure_optimizers()
    batches = zip(case["views"], case["small_crops"], strict=True)
    trainer = mock.Mock(world_size=1, global_rank=0, current_epoch=0, global_step=0)
    trainer.estimated_stepping_batches = len(case["views"])
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
            large, small = next(batches)
            targets = torch.zeros(len(ids), dtype=torch.int64)
            loss = model.training_step([ids, [*large, *small], targets], number)
            losses.append(logged[case["log"]].detach())
            # Without any cluster the mean over no rows is not a number: nothing is learnt.
            if case["method"] != "deepclusterv2" or trainer.current_epoch > 0:
                optimizer.zero_grad()
                loss.backward()
                model.on_after_backward()
                optimizer.step()
                trainer.global_step += 1
            model.on_train_batch_end(None, None, number)
            states.append({key: value.clone() for key, value in model.state_dict().items()})
    results = {key: torch.stack([state[key] for state in states]) for key in states[0]}
    results["losses"] = torch.stack(losses)
    if case["method"] == "deepclusterv2":
        results["centroids"] = torch.stack([p.weight.data for p in model.prototypes])
        results["assignments"] = model.assignments
    return results


def main(inputs, outputs):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    cases = torch.load(inputs, weights_only=True)
    torch.save({name: train(case) for name, case in cases.items()}, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
