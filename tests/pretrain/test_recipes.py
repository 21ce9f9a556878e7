"""Every recipe starts, says where it comes from, and is what docs/recipes.md says that it is."""

import re
from dataclasses import fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import dotted, parse_yaml, read_settings, to_plain
from pretrain.config import PretrainConfig, load_config, resolve
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.model.backbones.resnet import ResNetBackbone
from pretrain.run import make_trainer
from tests.pretrain.model.two_layers import TwoLayers

FOLDER = Path(__file__).parents[2] / "configs" / "pretrain"
RECIPES = sorted(p for p in FOLDER.rglob("*.yaml") if p.parent.name.startswith("imagenet"))
BATCH, SHARDS_HOLD = 16, 40
load = cache(load_config)


def tiny(config: PretrainConfig, out: Path, shards: Path) -> PretrainConfig:
    """The recipe at toy size: the same keys, one epoch of two steps, or two where it takes two."""
    optim, heads = config.optim, config.heads
    assert isinstance(config.arch, ResNetBackbone)
    small = {"num_negatives": 24, "num_prototypes": 6, "frozen_prototype_steps": 1}
    small = {key: value for key, value in small.items() if hasattr(config.objective, key)}
    augmentation = config.data.augmentation
    small_crops = replace(augmentation.small_crops, image_size=16)
    num_parts = config.data.batch_size // (optim.micro_batch_size or config.data.batch_size)
    return replace(
        config,
        out=str(out),
        arch=TwoLayers(),
        data=replace(
            config.data, shards=str(shards), image_size=32, batch_size=BATCH, num_workers=0,
            augmentation=replace(augmentation, small_crops=small_crops),
        ),
        heads=replace(heads, projector_hidden_dim=16, predictor_hidden_dim=8, output_dim=12),
        objective=replace(config.objective, **small),
        fa=replace(config.fa, queue_size=24, min_fill=16),
        optim=replace(
            optim, epochs=2 if config.objective.needs_sample_ids else 1, warmup_epochs=0.0,
            micro_batch_size=max(2, BATCH // num_parts) if num_parts > 1 else 0,
        ),
        engine=replace(config.engine, device="cpu", precision="fp32", log_every_steps=1),
        eval=replace(config.eval, num_pictures=0),
    )  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_recipe_makes_two_steps(path, tmp_path, shards):
    config = tiny(load(path, ()), tmp_path / "run", shards)
    run = make_trainer(config, resume=False)
    before = {k: v.clone() for k, v in run.task.model.online.named_parameters()}
    assert run.batches.num_steps == SHARDS_HOLD // BATCH == 2
    active, position = [], run.position
    for position.epoch in range(config.optim.epochs):
        position.step_in_epoch = 0
        for batch in run.batches.epoch(position.epoch):
            result = run.task.step(batch, position, is_logged=False, is_saved=False)
            position.step += 1
            position.step_in_epoch += 1
            active.append(result.output.is_augmented)
    for name, parameter in run.task.model.online.named_parameters():
        assert bool(torch.isfinite(parameter).all()), name
    moved = {n.partition(".")[0] for n, p in run.task.model.online.named_parameters()
             if not torch.equal(p, before[n])}  # fmt: skip
    assert moved == {n for n, _ in run.task.model.online.named_children()}
    if config.fa.uses_queue():
        assert active[:2] == [False, True]


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
    config, plain = load(path, ()), load(base, ())
    assert plain.fa.method == "none"
    augmentation = config.data.augmentation
    data = replace(plain.data, augmentation=augmentation)
    assert config == replace(plain, fa=config.fa, data=data)
    assert augmentation == plain.data.augmentation or "mask4" in path.stem


# --- docs/recipes.md: each value of a source, and ours

CONFIGS = FOLDER.parent
LINEAR = sorted((CONFIGS / "linear").glob("*.yaml"))
DOC = (CONFIGS.parent / "docs" / "recipes.md").read_text()
NOT_IN_A_PROTOCOL = {
    "seed", "subset_list", "holdout", "num_lrs", "lr_min", "lr_max", "refit", "passes",
    "shuffle_window", "checkpoint_every_steps", "knn_k", "knn_temperature", "device", "precision",
    "num_workers",
}  # fmt: skip


@cache
def values_of(path: Path, *overrides: str) -> dict[str, Any]:
    if path in LINEAR:
        return to_plain(read_settings(LinearConfig, path, overrides))
    return dotted(to_plain(load(path, overrides)))


def keys_that_matter(path: Path) -> set[str]:
    """Those that decide what a recipe computes, but for the ones that its method does not use."""
    flat = values_of(path)
    if path in LINEAR:
        unused = set() if flat["optimizer"] == "lars" else {"lars_eta"}
        unused |= set() if flat["schedule"] == "step" else {"milestones", "gamma"}
        return {field.name for field in fields(LinearConfig)} - NOT_IN_A_PROTOCOL - unused
    config = load(path, ())
    unused = {"data.augmentation.preset"}
    sections = ["arch.", "init.", "data.augmentation.", "heads.", "objective.", "optim."]
    keys = {key for key in flat if key.startswith(tuple(sections))}
    keys |= {"data.batch_size", "data.image_size", "engine.batch_norm"}
    keys |= {"fa.method", "fa.queue_size"} if "nnclr" in path.stem else set()
    if config.optim.name != "lars":
        unused |= {key for key in keys if key.startswith("optim.lars_")}
    if config.optim.micro_batch_size == 0:
        unused |= {"optim.accumulation"}
    if resolve(config.objective, config.fa).architecture == "basic":
        unused |= {"heads.predictor_hidden_dim", "optim.predictor_constant_lr"}
    if not config.heads.projector_last_bn:
        unused |= {"heads.projector_last_bn_affine"}
    small = "data.augmentation.small_crops."
    if flat[f"{small}num"] == 0:
        unused |= {key for key in keys if key.startswith(small)} - {f"{small}num"}
    mixing = getattr(config.objective, "mixing", None)
    if mixing is not None and not mixing.is_on:
        unused |= {key for key in keys if key.startswith("objective.mixing.")}
    for key in keys:
        section, _, name = key.rpartition(".")
        if name != "probability" and flat.get(f"{section}.probability") == 0:
            unused |= {key}
    return keys - unused


def alternatives(key: str) -> list[list[str]]:
    """The keys that a row is about: those of each value in its cells."""
    parts = [part.split(",") for part in re.split(r"[{}]", key)]
    of_value = ["".join(chosen) for chosen in product(*parts)]
    return [[x.replace("view*", f"view{n}") for n in (1, 2)] if "*" in x else [x] for x in of_value]


def listed() -> list[tuple[Path, list[str], str, Any]]:
    """(config, overrides, key, ours) of each value in the tables; a → b must differ and say why."""
    rows, head = [], []
    for line in DOC.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells or re.match(r"`(pretrain|linear)[a-z0-9/]*/`", cells[0]):
            head = cells
        elif head and cells[0].startswith("`"):
            folder, prefix = (*re.findall(r"`(.*?)`", head[0]), "")[:2]
            keys = alternatives(prefix + cells[0].strip("`"))
            for column, cell in zip(head[1:], cells[1:], strict=True):
                if not cell or column == "there":
                    continue
                source, _, own = cell.rpartition("→")
                own, _, note = re.sub(r" \[M\]$", "", own).strip().partition(" (")
                assert not note or f"\n{note.rstrip(')')}. " in DOC, (cells[0], cell)
                assert note or not source, f"{cells[0]}: {cell}: needs a reason"
                values = parse_yaml(f"[{own}]", cells[0])
                assert source.strip() != own, f"{cells[0]}: {cell}: these are the same"
                overrides = re.sub("`.*?`", "", column).split()
                for pattern in re.findall(r"`(.*?)`", column):
                    paths = sorted((CONFIGS / folder).glob(f"{pattern}.yaml"))
                    assert paths, f"{pattern}: no such config"
                    rows += [
                        (path, overrides, key, value)
                        for path in paths
                        for same, value in zip(keys, values, strict=True)
                        for key in same
                    ]
    return rows


def test_each_value_of_the_document_is_the_configs():
    for path, overrides, key, value in listed():
        own = values_of(path, *overrides)[key]
        is_number = isinstance(value, float | list)
        expected = pytest.approx(value, rel=1e-4) if is_number else value
        assert own == expected, f"{path.stem} {overrides} {key}: {own}; docs/recipes.md: {value}"


def test_each_key_of_each_config_is_in_the_document_once():
    rows = [(path, key) for path, overrides, key, _ in listed() if not overrides]
    assert len(set(rows)) == len(rows), {row for row in rows if rows.count(row) > 1}
    for path in (*RECIPES, *LINEAR):
        keys, needed = {key for other, key in rows if other == path}, keys_that_matter(path)
        assert keys == needed, (path.stem, keys ^ needed)


def test_settings_of_other_sources_load():
    rows = re.findall(r"\| `(imagenet\S+)` \|[^|]*\| `(\w+\.\S+=.*)` \|", DOC)
    assert len(rows) == 5
    for name, overrides in rows:
        given = re.split(r" (?=[a-z_.]+=)", overrides)
        path = FOLDER / f"{name}.yaml"
        assert values_of(path, *given) != values_of(path), name
