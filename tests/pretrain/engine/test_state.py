"""The state of a run: complete, plain, and refused where it does not belong."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.config import to_plain
from common.errors import UserError
from pretrain.config import PretrainConfig
from pretrain.engine import checkpoint
from pretrain.engine.contrastive_task import ADDED_LATER, NOT_COMPARED, ContrastiveTask
from pretrain.engine.optim import make_optimizer
from pretrain.engine.trainer import Position, Trainer
from tests.pretrain.model.references import step

PLAIN = (str, int, float, bool, type(None), torch.Tensor)


def build(make_model, objective="byol", method="nn", optimizer="lars"):
    model = make_model(objective, method=method)
    config = PretrainConfig()
    config = replace(
        config,
        fa=model.fa,
        objective=model.objective,
        optim=replace(config.optim, name=optimizer),
    )
    return config, model, make_optimizer(model.online, config.optim, 0.1)


def run_of(config, model, optimizer, steps_per_epoch=1, fingerprint=None):
    """A run without data, which stands before its first step."""
    cpu = torch.device("cpu")
    batches = SimpleNamespace(num_steps=steps_per_epoch, fingerprint=fingerprint)
    task = ContrastiveTask(config, model, optimizer, batches, Path("none"), cpu)
    return Trainer(task, batches, [], config.optim.epochs, config.engine, cpu)


def train(model, optimizer, make_views, steps):
    losses = []
    for number in steps:
        output = step(model, make_views(seed=number), number=number)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.after_optimizer_step(0.9, [output])
        losses.append(output.loss.item())
    return losses


def assert_plain(value, where="state"):
    if isinstance(value, dict):
        for key, item in value.items():
            assert type(key) in (str, int), where
            assert_plain(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            assert_plain(item, f"{where}[{number}]")
    else:
        assert isinstance(value, PLAIN), f"{where}: {type(value)}"


@pytest.mark.parametrize(
    ("objective", "method", "optimizer"),
    [
        ("byol", "nn", "lars"),
        ("infonce", "mixup", "adamw"),
    ],
)
def test_round_trip_goes_on_bit_equal(
    make_model, make_views, tmp_path, objective, method, optimizer
):
    path = tmp_path / "checkpoint.pth"
    config, model, optim = build(make_model, objective, method, optimizer)
    train(model, optim, make_views, range(2))
    run = run_of(config, model, optim)
    run.position = Position(step=2, epoch=1, num_bad_samples=3, train_seconds=1.5)
    checkpoint.save(run.state_dict(), path)
    expected = train(model, optim, make_views, range(2, 4))

    _, fresh, fresh_optim = build(make_model, objective, method, optimizer)
    again = run_of(config, fresh, fresh_optim)
    assert again.load_state_dict(checkpoint.load(path)) == []
    assert again.position == run.position
    assert train(fresh, fresh_optim, make_views, range(2, 4)) == expected
    for (name, a), (_, b) in zip(
        model.state_dict().items(), fresh.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def test_holds_plain_types_and_tensors_only(make_model, make_views, tmp_path):
    path = tmp_path / "checkpoint.pth"
    config, model, optim = build(make_model)
    train(model, optim, make_views, range(1))
    run = run_of(config, model, optim)
    run.position = Position(step=1)
    checkpoint.save(run.state_dict(), path)
    loaded = torch.load(path, weights_only=True)
    assert_plain(loaded)
    assert set(loaded) == {*checkpoint.FIELDS, "scaler", "checksum"}
    assert loaded["step"] == loaded["position"]["step"] == 1
    assert loaded["arch"] == {
        "name": "resnet", "depth": 50, "width_per_group": 64, "stem_channels": 64,
        "res2_channels": 256,
    }  # fmt: skip
    assert loaded["preprocessing"]["order"] == "RGB"
    assert loaded["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert loaded["preprocessing"]["std"] == [0.229, 0.224, 0.225]
    assert loaded["config"] == to_plain(config)
    assert {"backbone.conv1.weight", "projector.0.weight"} <= set(loaded["model"])
    assert {"backbone.conv1.weight", "projector.0.weight"} <= set(loaded["ema"])
    assert int(loaded["queue"]["count"]) == 8


@pytest.fixture
def saved(make_model, tmp_path):
    path = tmp_path / "checkpoint.pth"
    config, model, optim = build(make_model)
    checkpoint.save(run_of(config, model, optim).state_dict(), path)
    return path, config, model, optim


def test_another_config_is_refused_and_the_difference_shown(saved):
    path, config, model, optim = saved
    other = replace(
        config, seed=5, objective=replace(config.objective, ema_tau=0.5),
        data=replace(config.data, batch_size=64),
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        run_of(other, model, optim).load_state_dict(checkpoint.load(path))
    message = str(caught.value)
    assert "was made with another config" in message
    for line in ("seed: 0 -> 5", "objective.ema_tau: 0.99 -> 0.5", "data.batch_size: 256 -> 64"):
        assert line in message
    assert "start a new run with another out=DIR" in message


def test_what_decides_no_gradient_may_change(saved):
    path, config, model, optim = saved
    other = replace(
        config, out="elsewhere",
        engine=replace(config.engine, log_every_steps=1, num_threads=1),
        eval=replace(config.eval, knn_k=3),
        data=replace(config.data, shards="moved", num_workers=7, cache_gb=3, read_retries=1,
                     max_bad_samples=9),
    )  # fmt: skip
    assert run_of(other, model, optim).load_state_dict(checkpoint.load(path)) == []


def test_whose_rows_bn_sees_may_not_change(saved):
    path, config, model, optim = saved
    other = replace(config, engine=replace(config.engine, batch_norm="synchronised"))
    state = checkpoint.load(path)
    with pytest.raises(UserError, match=r"engine\.batch_norm: 'per_process' -> 'synchronised'"):
        run_of(other, model, optim).load_state_dict(state)
    for key in ADDED_LATER:  # as checkpoints were before there was a choice
        section = state["config"]
        *sections, last = key.split(".")
        for name in sections:
            section = section.get(name, {})
        section.pop(last, None)  # another objective's
    for group in state["optimizer"]["param_groups"]:
        del group["norm"]
    assert run_of(config, model, optim).load_state_dict(state) == []
    for parameter in model.online.parameters():
        parameter.grad = torch.ones_like(parameter)
    optim.step()
    with pytest.raises(UserError, match=r"'per_process' -> 'synchronised'"):
        run_of(other, model, optim).load_state_dict(state)


def test_small_crops_are_compared_where_there_are_some(saved):
    path, config, model, optim = saved

    def with_small(**options):
        policy = config.data.augmentation
        policy = replace(policy, small_crops=replace(policy.small_crops, **options))
        return replace(config, data=replace(config.data, augmentation=policy))

    state = checkpoint.load(path)
    other = run_of(with_small(image_size=64), model, optim)
    assert other.load_state_dict(state) == []  # of none
    for options, line in (({"num": 6}, "num: 0 -> 6"), ({"num": 6, "image_size": 64}, "num: 0")):
        with pytest.raises(UserError, match=rf"config: data\.\S*small_crops\.{line}[^;]*\. Re"):
            run_of(with_small(**options), model, optim).load_state_dict(state)
    state["config"] = to_plain(with_small(num=6))
    with pytest.raises(UserError, match=r"small_crops\.image_size: 96 -> 64"):
        run_of(with_small(num=6, image_size=64), model, optim).load_state_dict(state)


def test_every_other_key_is_compared(saved):
    """A new key is compared unless someone says otherwise."""
    path, config, model, optim = saved
    changed = torch.load(path, weights_only=True)
    num_compared = 0
    for section in ("arch", "init", "data", "heads", "objective", "fa", "optim"):
        for key in to_plain(config)[section]:
            if f"{section}.{key}" in NOT_COMPARED:
                continue
            saved_value = changed["config"][section][key]
            changed["config"][section][key] = "other"
            with pytest.raises(UserError, match=rf"{section}\.{key}: 'other' -> "):
                run_of(config, model, optim).load_state_dict(changed)
            changed["config"][section][key] = saved_value
            num_compared += 1
    assert num_compared > 30


def test_shards_of_another_fingerprint_are_refused(make_model, tmp_path):
    config, model, optim = build(make_model)
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(run_of(config, model, optim, fingerprint="one").state_dict(), path)
    assert (
        run_of(config, model, optim, fingerprint="one").load_state_dict(checkpoint.load(path)) == []
    )
    assert (
        run_of(config, model, optim).load_state_dict(checkpoint.load(path)) == []
    )  # a stream has no fingerprint
    with pytest.raises(UserError, match=r"data\.shards: other shards, or other weights of them"):
        run_of(config, model, optim, fingerprint="other").load_state_dict(checkpoint.load(path))


def test_allowed_changes_are_told_and_weights_must_fit(saved, make_model):
    path, config, model, optim = saved
    state = checkpoint.load(path)
    state["position"] |= {"step": 30, "epoch": 1, "step_in_epoch": 5}
    other = replace(config, optim=replace(config.optim, epochs=20))
    run = run_of(other, model, optim, 5)
    notes = run.load_state_dict(state, allow_changes=True)
    assert notes == ["going on with a changed config: optim.epochs: 100 -> 20"]
    position = run.position
    assert (position.step, position.epoch, position.step_in_epoch) == (30, 6, 0)
    optim_config = replace(
        config.optim, weight_decay=0.25, momentum=0.5, predictor_constant_lr=True
    )
    changed = replace(config, optim=optim_config)
    new = make_optimizer(model.online, optim_config, 0.1)
    wanted = [{k: v for k, v in group.items() if k != "params"} for group in new.param_groups]
    run_of(changed, model, new).load_state_dict(state, allow_changes=True)
    assert [{k: v for k, v in x.items() if k != "params"} for x in new.param_groups] == wanted
    adamw = replace(config, optim=replace(config.optim, name="adamw"))
    with pytest.raises(UserError, match=r"optim\.name=adamw: the checkpoint holds momenta of lars"):
        run_of(adamw, model, make_optimizer(model.online, adamw.optim, 0.1)).load_state_dict(
            state, allow_changes=True
        )
    _, wider, wider_optim = build(make_model, "infonce")
    wider.online.projector[0] = torch.nn.Linear(256, 30)
    with pytest.raises(UserError, match=r"does not fit this config \(seed: 0 -> 5\): .*projector"):
        run_of(replace(config, seed=5), wider, wider_optim).load_state_dict(
            state, allow_changes=True
        )
