"""Every recipe starts: two steps of its own cell, optimiser and accumulation, at toy size."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.config import PretrainConfig, load_config
from pretrain.model.backbones.resnet import ResNetBackbone
from pretrain.objectives.moco import MoCo
from pretrain.run import make_trainer

FOLDER = Path(__file__).parents[2] / "configs" / "pretrain"
RECIPES = sorted(p for p in FOLDER.rglob("*.yaml") if p.parent.name.startswith("imagenet"))
BATCH, SHARDS_HOLD = 16, 40


def tiny(config: PretrainConfig, out: Path, shards: Path) -> PretrainConfig:
    """The recipe at toy size: the same keys, one epoch of two steps."""
    optim, heads, width = config.optim, config.heads, 4
    assert isinstance(config.arch, ResNetBackbone)
    is_bottleneck = config.arch.is_bottleneck
    num_parts = config.data.batch_size // (optim.micro_batch_size or config.data.batch_size)
    return replace(
        config,
        out=str(out),
        arch=replace(
            config.arch, width_per_group=width, stem_channels=width,
            res2_channels=4 * width if is_bottleneck else width,
        ),
        data=replace(
            config.data, shards=str(shards), image_size=32, batch_size=BATCH, num_workers=0
        ),
        heads=replace(heads, projector_hidden_dim=16, predictor_hidden_dim=8, output_dim=12),
        objective=(
            replace(config.objective, num_negatives=24)
            if isinstance(config.objective, MoCo)
            else config.objective
        ),
        fa=replace(config.fa, queue_size=24, min_fill=16),
        optim=replace(
            optim, epochs=1, warmup_epochs=0.0,
            micro_batch_size=BATCH // num_parts if num_parts > 1 else 0,
        ),
        engine=replace(config.engine, device="cpu", precision="fp32", log_every_steps=1),
        eval=replace(config.eval, num_pictures=0),
    )  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_recipe_makes_two_steps(path, tmp_path, shards):
    config = tiny(load_config(path), tmp_path / "run", shards)
    run = make_trainer(config, resume=False)
    before = {k: v.clone() for k, v in run.task.model.online.named_parameters()}
    assert run.num_steps == SHARDS_HOLD // BATCH == 2
    active = []
    for batch in run.batches.epoch(0):
        result = run.task.step(batch, run.position, is_logged=False, is_saved=False)
        run.position.step += 1
        active.append(result.output.is_augmented)
    for name, parameter in run.task.model.online.named_parameters():
        assert bool(torch.isfinite(parameter).all()), name
    moved = {n.partition(".")[0] for n, p in run.task.model.online.named_parameters()
             if not torch.equal(p, before[n])}  # fmt: skip
    assert moved == {n for n, _ in run.task.model.online.named_children()}
    if config.fa.uses_queue():
        assert active == [False, True]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_recipe_says_where_it_comes_from(path):
    lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "".join(line[1:].strip() + " " for line in lines)
    for word in ("Source: ", "arXiv ", "Expected: ", "not measured by us", "GPU-hours: about "):
        assert word in text, word
    assert "an estimate" in text
    relative = path.relative_to(FOLDER.parents[1])
    assert f"Command: tools/pretrain.sh {relative} out=runs/{path.stem} " in text


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_recipe_with_fa_is_its_base_recipe_but_for_fa(path):
    base_name, is_fa, tail = path.stem.partition("_fa_")
    if not is_fa:
        return
    epochs = tail.partition("_")[2]
    base = path.with_name(f"{base_name}_{epochs}.yaml" if epochs else f"{base_name}.yaml")
    config, plain = load_config(path), load_config(base)
    assert plain.fa.method == "none"
    augmentation = config.data.augmentation
    data = replace(plain.data, augmentation=augmentation)
    assert config == replace(plain, fa=config.fa, data=data)
    assert augmentation == plain.data.augmentation or "mask4" in path.stem
