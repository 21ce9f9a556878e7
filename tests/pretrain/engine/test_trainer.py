"""The command line on the CPU: files, loss curve, kill and resume, every option of a run."""

import inspect
import itertools
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from common import threads
from common.files import read_json_lines
from pretrain.__main__ import main
from pretrain.config import load_config
from pretrain.engine import checkpoint
from pretrain.engine.trainer import Trainer
from pretrain.evaluation.probe import KnnCallback
from pretrain.model.joint_embedding import FAContrastive
from tests.pretrain.engine.run_helpers import (
    LIGHT,
    TINY,
    assert_same_state,
    error_of,
    one_step,
    rows_of,
    train_rows,
)
from tests.pretrain.model import references
from tests.pretrain.model.references import unit

ROOT = Path(__file__).parents[3]
BASE = TINY | LIGHT
RESNET = f"arch={TINY['arch'] | {'name': 'resnet'}}"
STEPS_PER_EPOCH = 5  # 40 pictures, batch 8
BYOL = [
    "objective.name=byol",
    "objective.ema_tau=0.9",
    "optim.name=lars",
    "optim.base_lr=2",
    "fa.queue_size=20",
]


def losses(folder):
    return [row["loss"] for row in train_rows(folder)]


def weights(folder):
    return checkpoint.load(folder / "checkpoint.pth")


def assert_same_training(a, b):
    """Bit for bit: losses of every step, and everything that the next step would depend on."""
    assert [r["step"] for r in train_rows(a)] == [r["step"] for r in train_rows(b)]
    for key in ("loss", "lr", "feature_std", "effective_rank", "fa_cosine", "fa_active", "epoch"):
        assert [r[key] for r in train_rows(a)] == [r[key] for r in train_rows(b)], key
    one, two = weights(a), weights(b)
    for part in ("model", "ema", "optimizer", "queue", "negatives", "schedule"):
        assert_same_state(one[part], two[part], part)


def test_files_of_a_run(start, shards):
    status, folder, err = start(
        "files", RESNET, f"eval.probe_train={shards}", f"eval.probe_val={shards}",
        "eval.num_pictures=3",
        "engine.keep_checkpoints=1", "engine.checkpoint_every_steps=4", "eval.knn_every_epochs=1",
    )  # fmt: skip
    assert status == 0, err
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    board = {p for p in found if p.startswith("tensorboard/")}
    assert len(board) == 1
    assert found - board == {
        "config.yaml", "environment.json", "metrics.jsonl", "checkpoint.pth", "summary.json",
        "checkpoints/step-00000010.pth",
        "pictures/views.jpg", "pictures/views.json",
        "pictures/neighbours.jpg", "pictures/neighbours.json",
        "pictures/neighbours_before.jpg", "pictures/neighbours_before.json",
        "pictures/feature_map.png",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == {
        "steps", "epochs", "seconds", "images_per_second", "knn_top1", "knn_top1_initial",
        "num_samples", "num_skipped_samples", "peak_memory_bytes",
    }  # fmt: skip
    assert (summary["steps"], summary["epochs"], summary["num_samples"]) == (10, 2, 40)
    assert summary["num_skipped_samples"] == 0
    assert summary["images_per_second"] == pytest.approx(80 / summary["seconds"])
    assert 100e6 < summary["peak_memory_bytes"] < 20e9
    rows = read_json_lines(folder / "metrics.jsonl")
    knn = [r["knn_top1"] for r in rows if r["kind"] == "knn"]
    assert len(knn) == 3
    assert (summary["knn_top1_initial"], summary["knn_top1"]) == (knn[0], knn[-1])
    assert {r["kind"] for r in rows} == {"train", "knn", "event", "similarity"}
    row = train_rows(folder)[4]
    assert {
        "step", "epoch", "loss", "lr", "images_per_second", "data_wait_share", "feature_std",
        "effective_rank", "fa_cosine", "fa_active",
    } <= set(row)  # fmt: skip
    assert (row["step"], row["epoch"]) == (5, 1.0)
    assert 0 <= row["data_wait_share"] <= 1
    assert [r["fa_active"] for r in train_rows(folder)] == [0, 0] + [1] * 8  # 16 of batch 8
    environment = json.loads((folder / "environment.json").read_text())
    assert set(environment) == {"versions", "commit", "command", "device", "num_threads"}
    assert environment["device"] == "cpu"
    assert environment["num_threads"] == 1
    again = load_config(folder / "config.yaml")
    assert again.out == str(folder)
    assert again.optim.epochs == 2
    state = weights(folder)
    assert state["step"] == 10
    assert state["arch"] == {"name": "resnet"} | TINY["arch"]
    assert "pretrain: 100%" in err
    assert "loss=" in err


class Again:
    """NNBYOL with LARS in the plainest form: modules, momenta, a growing list as queue."""

    def __init__(self, config):
        torch.manual_seed(0)
        model = FAContrastive(config.arch, config.heads, config.objective, config.fa)
        self.net, self.ema, self.bank = model.online, model.ema, torch.zeros(0, 12)
        weights = list(self.net.parameters())
        self.parameters = [w for w in weights if w.ndim > 1] + [w for w in weights if w.ndim <= 1]
        self.momenta = [torch.zeros_like(w) for w in self.parameters]

    def take(self, state):
        """The run's own state before the next step, so that rounding does not add up."""
        self.net.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        moments = state["optimizer"]["state"]
        self.momenta = [moments[i]["momentum_buffer"].clone() for i in range(len(moments))]

    def step(self, views, step):
        """The loss; everything is moved on. Rate 2 x 8 / 256, warm-up of half an epoch of two."""
        assert self.net.predictor is not None
        assert self.ema is not None
        p = [self.net.predictor(self.net.projector(self.net.backbone(v))) for v in views]
        with torch.no_grad():
            t = [self.ema.projector(self.ema.backbone(v)) for v in views]
        loss = 0
        for v in (0, 1):
            target = t[1 - v]
            if len(self.bank) >= 16:
                target = self.bank[(unit(target) @ unit(self.bank).T).argmax(dim=1)]
            loss = loss + ((unit(p[v]) - unit(target)) ** 2).sum(1).mean()
        self.net.zero_grad(set_to_none=True)
        loss.backward()
        epoch = (step + 0.5) / STEPS_PER_EPOCH
        rate = epoch / 0.5 if epoch < 0.5 else (1 + math.cos(math.pi * (epoch - 0.5) / 1.5)) / 2
        tau = 1 - 0.1 * (math.cos(math.pi * step / 10) + 1) / 2
        with torch.no_grad():
            for w, m in zip(self.parameters, self.momenta, strict=True):
                g = w.grad
                assert g is not None
                if w.ndim > 1:
                    g = g + 1e-6 * w
                    g = g * 1e-3 * w.norm() / g.norm()
                m.mul_(0.9).add_(g)
                w.sub_(2 * 8 / 256 * rate * m)
            for key, slow in self.ema.named_parameters():
                slow.copy_(tau * slow + (1 - tau) * self.net.get_parameter(key))
        self.bank = torch.cat([self.bank, unit(t[0])])[-20:]
        return loss.item()


@pytest.mark.parity
def test_curve_equals_a_loop_written_again(start, make_run):
    """Data and modules are the package's; loss, queue, optimiser, schedules and EMA are not.

    Each step starts from the run's own checkpoint before it: tiny networks amplify rounding.
    """
    options = [*BYOL, "engine.channels_last=false"]
    keep = ["engine.checkpoint_every_steps=1", "engine.keep_checkpoints=10"]
    status, folder, err = start("golden", *options, *keep)
    assert status == 0, err
    run = make_run(*options)
    again, curve = Again(run.task.config), []
    for batch in itertools.chain(run.batches.epoch(0), run.batches.epoch(1)):
        before = {k: v.detach().clone() for k, v in again.net.named_parameters()}
        curve.append(again.step(batch.views, len(curve)))
        state = checkpoint.load(folder / "checkpoints" / f"step-{len(curve):08d}.pth")
        # The update as one vector: rounding aside, the same length and direction.
        ours = torch.cat([(state["model"][k] - v).flatten() for k, v in before.items()])
        theirs = [(w.detach() - before[k]).flatten() for k, w in again.net.named_parameters()]
        theirs = torch.cat(theirs)
        assert float((ours - theirs).norm()) < 0.02 * float(theirs.norm())
        filled = state["queue"]["features"][: len(again.bank)]
        ring = torch.roll(filled, -int(state["queue"]["position"]) % len(filled), 0)
        entries = ring if len(filled) == 20 else filled
        torch.testing.assert_close(entries, again.bank, rtol=0, atol=1e-3)
        for key, slow in again.ema.named_parameters():
            torch.testing.assert_close(slow, state["ema"][key], rtol=1e-3, atol=1e-4)
        again.take(state)
    np.testing.assert_allclose(losses(folder), curve, rtol=1e-4)
    assert len(set(curve)) == 10


def test_resume_starts_refuses_and_goes_on(start):
    """Without a checkpoint, without --resume, with another config, and with one allowed."""
    status, folder, _ = start("run", "optim.epochs=1", "--resume")
    assert status == 0
    curve, first = losses(folder), weights(folder)["model"]
    result = start("run", "optim.epochs=1")
    assert "holds a run already: continue it with --resume, or choose another out=" in error_of(
        result, 2
    )
    changed = ("run", "optim.epochs=1", "fa.nn.top_k=2", "--resume")
    assert "fa.nn.top_k: 1 -> 2" in error_of(start(*changed), 2)
    assert losses(folder) == curve
    status, _, err = start(*changed, "--allow-changes")
    assert status == 0, err
    told = "going on with a changed config: fa.nn.top_k: 1 -> 2"
    assert f"warning: {told}" in err
    assert told in [row["message"] for row in rows_of(folder, "event")]
    assert losses(folder) == curve
    assert_same_state(weights(folder)["model"], first)


def test_a_signal_saves_and_the_resumed_run_is_the_same(start, shards, monkeypatch):
    options = [RESNET, "data.num_workers=1", "eval.knn_every_epochs=1"]
    options += [f"eval.probe_train={shards}", f"eval.probe_val={shards}"]
    _, whole, _ = start("whole", *options)
    step, handler = Trainer.step, signal.getsignal(signal.SIGTERM)

    def interrupted(self, batch):
        if self.position.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", interrupted)
        status, folder, err = start("cut", *options)
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 7; the checkpoint is saved" in err
    assert "Traceback" not in err
    assert weights(folder)["step"] == 7
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not (folder / "summary.json").exists()
    status, folder, err = start("cut", *options, "--resume")
    assert status == 0, err
    assert_same_training(whole, folder)
    assert rows_of(whole, "knn") == rows_of(folder, "knn")
    summaries = [json.loads((f / "summary.json").read_text()) for f in (whole, folder)]
    for key in ("steps", "knn_top1", "knn_top1_initial", "num_skipped_samples"):
        assert summaries[0][key] == summaries[1][key], key
    _, other, _ = start("other", "optim.epochs=1", "seed=1")
    assert not set(losses(whole)) & set(losses(other)), "another seed, another curve"


def test_interrupted_at_an_epoch_s_end_probes_once(start, shards, monkeypatch):
    """A checkpoint at the end of an epoch is made before the probe that is due there."""
    options = ["engine.checkpoint_every_steps=5", f"eval.probe_train={shards}"]
    options += [f"eval.probe_val={shards}", "eval.knn_every_epochs=1"]
    probe = KnnCallback.on_epoch_end

    def dying_probe(self):
        probe(self)
        if self.trainer.position.step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(KnnCallback, "on_epoch_end", dying_probe)
    assert start("cut", *options)[0] == 130
    monkeypatch.undo()
    status, folder, err = start("cut", *options, "--resume")
    assert status == 0, err
    knn = [r["step"] for r in rows_of(folder, "knn")]
    assert knn == [0, 5, 10]
    assert [r["step"] for r in train_rows(folder)] == list(range(1, 11))


def test_a_stream_trains_to_the_end_and_goes_on_after_a_stop(start, shards):
    stream = ("data.streaming=true", "data.samples_per_epoch=24", "data.shuffle_window=16")
    status, folder, _ = start("stream", *stream, f"data.shards={shards}/*.tar", "optim.epochs=1")
    assert status == 0
    assert [row["step"] for row in train_rows(folder)][-1] == 3  # 24 samples, batches of 8
    status, folder, _ = start(
        "stream", *stream, f"data.shards={shards}/*.tar", "optim.epochs=2", "--resume",
        "--allow-changes",
    )  # fmt: skip
    assert status == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["epochs"]) == (6, 2)
    assert [row["step"] for row in train_rows(folder)] == [1, 2, 3, 4, 5, 6]


def test_intervals_of_rows_checkpoints_and_probes(start, shards):
    status, folder, err = start(
        "intervals", "engine.log_every_steps=4", "engine.checkpoint_every_steps=3",
        "engine.keep_checkpoints=2", f"eval.probe_train={shards}", f"eval.probe_val={shards}",
        "optim.epochs=3", "eval.knn_every_epochs=2",
    )  # fmt: skip
    assert status == 0, err
    assert [r["step"] for r in train_rows(folder)] == [4, 8, 12, 15]
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert kept == ["step-00000012.pth", "step-00000015.pth"]
    knn = rows_of(folder, "knn")
    assert [(r["step"], r["epoch"]) for r in knn] == [(0, 0), (10, 2), (15, 3)]
    assert all(0 <= r["knn_top1"] <= 1 for r in knn)


def test_views_have_the_size_and_normalisation_of_the_config(make_run):
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    run = make_run(
        "data.augmentation=none", "data.image_size=48",
        "data.pixel_mean=[0.1,0.2,0.3]", "data.pixel_std=[0.4,0.5,0.6]",
    )  # fmt: skip
    batch = next(iter(run.batches.epoch(0)))
    batch, views = batch.samples, batch.views
    assert views.shape == (2, 8, 3, 48, 48)
    raw = batch.views.double() / 255
    expected = (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(views.double(), expected, atol=1e-5, rtol=1e-5)


def test_arch_heads_and_threads_of_the_config_are_built(make_run):
    run = make_run(
        "arch={depth: 18, width_per_group: 12, res2_channels: 12, stem_channels: 10}",
        "init.residual_gamma=0.25", "engine.num_threads=2",
        "heads.projector_layers=3", "heads.projector_hidden_dim=20", "heads.output_dim=6",
        "heads.projector_last_bn=true", "heads.projector_last_bn_affine=false",
        "heads.projector_hidden_bn=false", "heads.predictor_hidden_dim=10", "heads.dropout=0.25",
    )  # fmt: skip
    assert torch.get_num_threads() == 2
    online = run.task.model.online
    state = online.backbone.state_dict()
    assert state["conv1.weight"].shape[0] == 10
    assert state["layer1.0.conv1.weight"].shape == (12, 10, 3, 3)
    assert "layer1.0.conv3.weight" not in state
    assert torch.equal(state["layer3.1.bn2.weight"], torch.full((48,), 0.25))
    assert "layer1.2.conv1.weight" not in state
    linear = [
        [(m.in_features, m.out_features) for m in head if isinstance(m, torch.nn.Linear)]
        for head in (online.projector, online.predictor)
    ]
    assert linear == [[(96, 20), (20, 20), (20, 6)], [(6, 10), (10, 6)]]
    assert run.task.model.queue.features.shape == (32, 6)
    (norm,) = [m for m in online.projector if isinstance(m, torch.nn.BatchNorm1d)]
    assert norm is online.projector[-1]
    assert not norm.affine
    for head, number in ((online.projector, 2), (online.predictor, 1)):
        assert [m.p for m in head if isinstance(m, torch.nn.Dropout)] == [0.25] * number


def test_a_resumed_run_has_as_many_threads_as_before(start, make_run, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.setattr(threads, "free_cores", lambda: 1.0)
    free = ("engine.num_threads=0", "optim.epochs=1")
    status, folder, err = start("run", *free)
    assert status == 0
    assert "CPU threads: 1 (1.0 of" in err
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["num_threads"] == 1
    monkeypatch.setattr(threads, "free_cores", lambda: 2.0)  # idle now
    assert start("run", *free, "optim.epochs=2", "--resume", "--allow-changes")[0] == 0
    assert json.loads((folder / "environment.json").read_text())["num_threads"] == 1
    make_run(*free, name="other")
    assert torch.get_num_threads() == 2


def test_precision_decides_autocast(make_run):
    seen, results = [], {}
    for precision in ("fp32", "bf16", "fp16"):
        run = make_run(f"engine.precision={precision}")
        run.task.model.online.projector[0].register_forward_hook(lambda *a: seen.append(a[2].dtype))
        output = one_step(run).output
        results[precision] = output.loss.item()
        assert output.loss.dtype == torch.float32
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2 + [torch.float16] * 2
    for precision in ("bf16", "fp16"):
        assert results["fp32"] != results[precision]
        assert results["fp32"] == pytest.approx(results[precision], abs=0.5)  # BN of 8 samples


def test_channels_last_changes_memory_not_meaning(make_run):
    results = {}
    for flag in (True, False):
        run = make_run(RESNET, f"engine.channels_last={str(flag).lower()}")
        views = next(iter(run.batches.epoch(0))).views
        weight = run.task.model.online.backbone.get_submodule("layer1.0").conv2.weight
        for tensor in (views[0], views[1], weight):
            assert tensor.is_contiguous(memory_format=torch.channels_last) == flag
        assert views.shape == (2, 8, 3, 32, 32)
        results[flag] = (views, references.step(run.task.model, views).loss)
    assert torch.equal(results[True][0], results[False][0])
    torch.testing.assert_close(results[True][1], results[False][1], rtol=1e-4, atol=1e-5)


def test_print_config_shows_values_after_overrides(config_file, capsys):
    assert main([str(config_file), "seed=7", "--print-config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["seed"] == 7
    assert shown["arch"] == LIGHT["arch"]


def test_a_batch_reaches_its_loss_in_at_most_eight_frames(make_run, monkeypatch):
    from pretrain.objectives import infonce

    loss, stacks = infonce.infonce_loss, []

    def seen(*arguments, **options):
        stacks.append([frame.filename for frame in inspect.stack()[1:]])
        return loss(*arguments, **options)

    monkeypatch.setattr(infonce, "infonce_loss", seen)
    run = make_run(
        "optim.micro_batch_size=4", "optim.accumulation=cached", "engine.watchdog_seconds=0"
    )
    run.step(next(iter(run.batches.epoch(0))))
    ours = [name for name in stacks[0] if name.startswith(str(ROOT / "pretrain"))]
    assert ours[-1].endswith("engine/trainer.py")
    assert len(ours) + 1 <= 8, ours  # and the loss function
