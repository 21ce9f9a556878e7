"""From an experiment's settings to its stages: commands, inputs, outputs and what decides them."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import read_yaml, to_plain
from common.errors import UserError
from pipeline.config import FROZEN, RANDOM, PipelineConfig
from pipeline.stages import Stage

_OPENCV = ("opencv-python", "opencv-python-headless")
_PRETRAIN = ("torch", "torchvision", "numpy", *_OPENCV, "simplejpeg")
_DETECTION = ("torch", "torchvision", "numpy", "pillow", "detectron2")
_PICTURES = ("numpy", *_OPENCV, "pillow")
KINDS = {
    "data": ("tools/make_dataset.py", 1, _PICTURES),
    "shards": ("tools/make_shards.py", 1, _PICTURES),
    "pretrain": ("tools/pretrain.sh", 1, _PRETRAIN),
    "linear": ("tools/linear_eval.py", 1, _PRETRAIN),
    "convert": ("tools/convert_to_d2.py", 1, _DETECTION),
    "detection": ("tools/train_voc.sh", 1, _DETECTION),
    "report": ("pipeline/report/report.py", 1, ("jinja2", "matplotlib", "pillow")),
}
"""Kind of a stage -> its program, the version of its code, distributions whose versions count.

Raise the version when a change of the code changes what the stage makes: finished stages of older
versions then run again.
"""
_JOINED_BY = {"classes": ",", "train_split": "+"}  # lists among the options of train_voc.sh


def build_stages(config: PipelineConfig, root: Path, out: Path) -> list[Stage]:
    """Return the stages in the order in which they run, each after those that it reads.

    Args:
        config: The settings.
        root: The repository.
        out: The run's folder, absolute.
    Raises:
        UserError: If a file that the settings name does not exist.
    """
    data, detection, variants = config.data, config.detection, config.all_variants
    is_made = data.kind != "existing"
    stages: list[Stage] = []

    def call(kind: str, *words: Any) -> tuple[str, ...]:
        script = KINDS[kind][0]
        program = sys.executable if script.endswith(".py") else "bash"
        return (program, str(root / script), *map(str, words))

    def add(kind: str, name: str, words: list[Any], check: list[Any] | None, **facts: Any) -> None:
        if check is not None:
            # Data that an earlier stage makes is not there yet: then only settings are checked.
            has_data = all(name.startswith("convert") for name in facts.get("upstream", ()))
            check += ["--check", "all" if has_data else "settings", "--json"]
        stages.append(
            Stage(
                name=name, kind=kind, command=call(kind, *words),
                code_version=KINDS[kind][1], libraries=KINDS[kind][2],
                check=() if check is None else call(kind, *check), **facts,
            )
        )  # fmt: skip

    # The data set, if it is not the user's own.
    if is_made:
        words = [data.kind, out / "data", *flags(data.options)]
        add(
            "data", "data", words, [*words],
            outputs=("data/dataset.json",), owns=("data", "data.partial"), products=("data",),
            config={"data": {"kind": data.kind, "options": data.options}},
        )  # fmt: skip

    # Shards of the pool (maybe in parts) and of the probe, unless they are packed already.
    pack, probe = flags(config.shards.options), flags(config.probes.options)
    if is_made:
        pool, train, val = (out / "data" / name for name in ("pool", "probe/train", "probe/val"))
    else:
        own = (data.shards or data.pool, data.probe_train, data.probe_val)
        pool, train, val = (Path(path).resolve() if path else None for path in own)
        pack += flags({"split": data.pool_split})
    sources: dict[str, tuple[Path | None, list[str]]] = {"shards": (pool, pack)}
    if data.shares:
        ends = [0.0, *data.shares, 1.0]
        del sources["shards"]
        for low, high in itertools.pairwise(ends):
            sources[f"shards/{high:g}"] = (pool, [*pack, "--part", f"{low:g}:{high:g}"])
    sources |= {"probe_train": (train, probe), "probe_val": (val, probe)}
    if not any(variant.weights is None for variant in variants.values()):
        sources = {}
    packed: dict[str, Path] = {}
    for name, (source, options) in sources.items():
        if source is None:
            continue
        packed[name] = source
        if is_made or not (source / "index.json").is_file():
            packed[name] = out / name
            words = [source, out / name, *options]
            add(
                "shards", name, words, [*words],
                outputs=(f"{name}/index.json",), owns=(name,), upstream=("data",) * is_made,
                files=() if is_made else (source,), config={"options": options}, resumable=True,
            )  # fmt: skip
    packing = tuple(name for name in packed if packed[name] == out / name)
    probes = {f"eval.{name}": str(packed[name]) for name in ("probe_train", "probe_val")
              if name in packed}  # fmt: skip

    detector = find_config(root, detection.config) if config.arms else None
    detector_options = detection_words(config)
    backbones: dict[tuple[str, int], tuple[Path | str, tuple[str, ...]]] = {}
    for seed in config.all_seeds:
        # Backbones: pretrained here, or given; those that have no card are converted.
        for variant in variants.values():
            own_seed = seed if config.seeds.pretraining and variant.weights is None else None
            if "{seed}" in (variant.weights or ""):
                own_seed = seed
            if variant.weights == RANDOM or (own_seed is None and seed > 0):
                backbones[variant.name, seed] = backbones.get((variant.name, 0), (RANDOM, ()))
                continue
            is_plain = variant.name == "pretrained" and variant.weights is None and own_seed is None
            tail = "" if is_plain else f"/{variant.name}"
            tail += "" if own_seed is None else f"/seed-{own_seed}"
            if variant.weights is None:
                weights = out / f"pretrain{tail}/checkpoint.pth"
                own_yaml = find_config(root, variant.config or config.pretrain.config)
                overrides = config.pretrain.overrides | variant.overrides
                shares = [f"shards/{share:g}" for share in (*data.shares, 1.0)
                          if share <= variant.pool] if data.shares else ["shards"]  # fmt: skip
                folders = [str(packed[name]) for name in shares]
                settings: dict[str, Any] = {
                    "out": str(out / f"pretrain{tail}"),
                    "data.shards": folders if data.shares else folders[0],
                } | probes
                settings |= {} if own_seed is None else {"seed": own_seed}
                clash = sorted(settings.keys() & overrides.keys())
                if clash:
                    raise UserError(
                        f"pretrain.overrides.{clash[0]} is set by the pipeline; leave it out"
                    )
                words = [  # JSON is YAML, too
                    f"{key}={value if isinstance(value, str) else json.dumps(value)}"
                    for key, value in (settings | overrides).items()
                ]
                first = [word for word in words if not word.startswith(("out=", "seed="))]
                unmade = tuple(name for name in (*shares, "probe_train", "probe_val")
                               if name in packing)  # fmt: skip
                indexes = [packed[name] / "index.json" for name in shares if name not in packing]
                group = "evaluation" if config.pretrain.side_by_side else ""
                add(
                    "pretrain", f"pretrain{tail}", [own_yaml, *words, "--resume"],
                    [own_yaml, *first],
                    outputs=(f"pretrain{tail}/checkpoint.pth", f"pretrain{tail}/summary.json"),
                    owns=(f"pretrain{tail}",), products=(f"pretrain{tail}/checkpoint.pth",),
                    upstream=unmade, files=(own_yaml, *indexes),
                    config={"overrides": overrides, "pool": variant.pool},
                    resumable=True, group=group, label=variant.label,
                )  # fmt: skip
                from_here = {"upstream": (f"pretrain{tail}",)}
                if "linear" in config.evaluations:
                    workers = read_yaml(own_yaml).get("data", {}).get("num_workers", 2)
                    workers = overrides.get("data.num_workers", workers)
                    add(
                        "linear", f"linear{tail}",
                        [weights, "--train", packed["probe_train"], "--val", packed["probe_val"],
                         "--out", out / f"linear{tail}", "--protocol", "cached", "--resume",
                         f"num_workers={workers}"], None,
                        outputs=(f"linear{tail}/linear.json",), owns=(f"linear{tail}",),
                        resumable=True, group="evaluation", label=variant.label, **from_here,
                    )  # fmt: skip
                branch = ["--branch", config.convert.branch]
            else:
                weights = Path(variant.weights.replace("{seed}", str(seed))).resolve()
                if not weights.is_file():
                    raise UserError(f"variant {variant.name}: {weights} does not exist")
                from_here, branch = {"files": (weights,)}, []
                if weights.with_suffix(".json").is_file():  # its card
                    backbones[variant.name, seed] = (weights, ())
                    continue
            converted = out / f"convert{tail}/backbone.{config.convert.format}"
            backbones[variant.name, seed] = (converted, (f"convert{tail}",))
            if any(arm.removesuffix(FROZEN) == variant.name for arm in config.arms):
                words = [weights, converted, *branch]
                add(
                    "convert", f"convert{tail}", words, [*words] if variant.weights else None,
                    outputs=(f"convert{tail}/{converted.name}", f"convert{tail}/backbone.json"),
                    owns=(f"convert{tail}",), products=(f"convert{tail}/{converted.name}",),
                    config={"branch": config.convert.branch, "format": config.convert.format},
                    **from_here,
                )  # fmt: skip

        # Detection: all arms of a seed before the next seed, so that pairs can soon be compared.
        for arm in config.arms:
            assert detector is not None
            weights, upstream = backbones[arm.removesuffix(FROZEN), seed]
            dataset = dataset_folder(config, out, seed)
            shared = ["--config", detector, "--data", dataset, "--out"]
            freeze = ["--freeze"] * arm.endswith(FROZEN)
            files = [detector, *config_bases(detector)]
            files += [] if is_made else [dataset]
            files += [weights] if isinstance(weights, Path) and not upstream else []
            place = f"detection/{arm}"
            add(
                "detection", f"{arm}/seed-{seed}",
                [weights, *shared, out / place, "--seeds", seed, "--arm", arm, *freeze,
                 *detector_options],
                [RANDOM if upstream else weights, *shared, out / "detection", *detector_options],
                outputs=(f"{place}/seed-{seed}/result.json",), owns=(f"{place}/seed-{seed}",),
                upstream=("data",) * is_made + upstream, files=tuple(files),
                config={"arm": arm, "seed": seed, "overrides": detection.overrides}
                | {"options": detection.options},
                resumable=True, group="evaluation",
            )  # fmt: skip

    # The page of an unfinished run is written by hand or after a failure, so that it owns nothing.
    add(
        "report", "report", [out], None, outputs=("report.html",), owns=(),
        upstream=tuple(stage.name for stage in stages), config={"pipeline": to_plain(config)},
    )  # fmt: skip
    return stages


def detection_words(config: PipelineConfig) -> list[str]:
    """Options and overrides of `tools/train_voc.sh` that all arms share."""
    options = dict(config.detection.options)
    for key, separator in _JOINED_BY.items():
        if isinstance(options.get(key), list):
            options[key] = separator.join(map(str, options[key]))
    words = flags(options)
    for key, value in config.detection.overrides.items():
        words += [key, str(value)]  # Detectron2 reads Python's own spelling.
    return [*words, *config.detection.words]


def dataset_folder(config: PipelineConfig, out: Path, seed: int = 0) -> Path:
    """Return the VOC-layout set that detection is trained and tested on."""
    own = config.data.dataset
    return out / "data" if own is None else Path(own.replace("{seed}", str(seed))).resolve()


def find_config(root: Path, name: str) -> Path:
    """Return a config file's path, given relative to the repository or to the working folder.

    Raises:
        UserError: If it is in neither.
    """
    for candidate in (root / name, Path(name)):
        if candidate.is_file():
            return candidate.resolve()
    raise UserError(f"config file {name} does not exist, neither in {root} nor here")


def config_bases(path: Path) -> list[Path]:
    """Return the files that a Detectron2 YAML builds on through `_BASE_`, nearest first.

    Raises:
        UserError: If one of the files cannot be read or is not YAML.
    """
    bases: list[Path] = []
    while base := read_yaml(path).get("_BASE_"):
        path = (path.parent / str(base)).resolve()
        if path in bases:
            raise UserError(f"{path}: builds on itself through _BASE_; remove one of the lines")
        bases.append(path)
    return bases


def flags(options: Mapping[str, Any]) -> list[str]:
    """Return options as command line arguments: `num_train: 3` becomes `--num-train 3`.

    True becomes a bare flag, False and None are left out, lists become several words.
    """
    words: list[str] = []
    for key, value in options.items():
        if value is None or value is False:
            continue
        words.append("--" + key.replace("_", "-"))
        if isinstance(value, list):
            words += [str(item) for item in value]
        elif value is not True:
            words.append(str(value))
    return words
