"""From a pipeline's settings to its stages: commands, inputs, outputs and what decides them."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import read_yaml, to_plain
from common.errors import UserError
from pipeline.config import PipelineConfig
from pipeline.stages import Stage

_OPENCV = ("opencv-python", "opencv-python-headless")
PRETRAIN_LIBRARIES = ("torch", "torchvision", "numpy", *_OPENCV, "simplejpeg")
DETECTION_LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "detectron2")
PICTURE_LIBRARIES = ("numpy", *_OPENCV, "pillow")

# Raise a stage's number when a change of the code changes what the stage makes: finished stages of
# older numbers then run again.
CODE_VERSIONS = {"data": 1, "shards": 1, "pretrain": 1, "convert": 1, "detection": 1, "report": 1}


def build_stages(config: PipelineConfig, root: Path, out: Path) -> list[Stage]:
    """Return the stages in the order in which they run, each after those that it reads.

    Args:
        config: The settings.
        root: The repository.
        out: The run's folder, absolute.
    Raises:
        UserError: If a config file that the settings name does not exist.
    """
    data, detection = config.data, config.detection
    made = data.kind != "existing"
    dataset = dataset_folder(config, out)
    stages: list[Stage] = []

    def call(script: str, *words: str | Path) -> tuple[str, ...]:
        program = sys.executable if script.endswith(".py") else "bash"
        return (program, str(root / script), *map(str, words))

    # The data set, if it is not the user's own.
    if made:
        words = (data.kind, out / "data", *flags(data.options))
        stages.append(
            Stage(
                name="data",
                command=call("tools/make_dataset.py", *words),
                outputs=("data/dataset.json",),
                owns=("data", "data.partial"),
                products=("data",),
                config={"data": to_plain(config)["data"]},
                code_version=CODE_VERSIONS["data"],
                libraries=PICTURE_LIBRARIES,
            )
        )

    # Shards for pretraining and for the kNN probe, of what is not packed yet.
    pack, probe = flags(config.shards.options), flags(config.probes.options)
    if made:
        pool, train, val = (out / "data" / name for name in ("pool", "probe/train", "probe/val"))
    else:
        own = (data.pool, data.probe_train, data.probe_val)
        pool, train, val = (Path(path).resolve() if path else None for path in own)
        pack += flags({"split": data.pool_split})
    sources = {"shards": (pool, pack), "probe_train": (train, probe), "probe_val": (val, probe)}
    stages += [
        Stage(
            name=name,
            command=call("tools/make_shards.py", source, out / name, *words),
            outputs=(f"{name}/index.json",),
            owns=(name,),
            upstream=("data",) if made else (),
            files=() if made else (source,),
            config={"options": words},
            code_version=CODE_VERSIONS["shards"],
            libraries=PICTURE_LIBRARIES,
            resumable=True,
        )
        for name, (source, words) in sources.items()
        if source is not None
    ]

    # Pretraining.
    shards = Path(data.shards).resolve() if data.shards else out / "shards"
    settings: dict[str, Any] = {"out": str(out / "pretrain"), "data.shards": str(shards)}
    if train is not None:
        settings |= {f"eval.{name}": str(out / name) for name in ("probe_train", "probe_val")}
    clash = sorted(settings.keys() & config.pretrain.overrides.keys())
    if clash:
        raise UserError(f"pretrain.overrides.{clash[0]} is set by the pipeline; leave it out")
    own_yaml = find_config(root, config.pretrain.config)
    words = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"  # JSON is YAML, too
        for key, value in (settings | config.pretrain.overrides).items()
    ]
    stages.append(
        Stage(
            name="pretrain",
            command=call("tools/pretrain.sh", own_yaml, *words, "--resume"),
            outputs=("pretrain/checkpoint.pth", "pretrain/summary.json"),
            owns=("pretrain",),
            products=("pretrain/checkpoint.pth",),
            upstream=tuple(stage.name for stage in stages if stage.name != "data"),
            files=(own_yaml, shards / "index.json") if data.shards else (own_yaml,),
            config={"overrides": config.pretrain.overrides},
            code_version=CODE_VERSIONS["pretrain"],
            libraries=PRETRAIN_LIBRARIES,
            resumable=True,
        )
    )

    # Conversion to Detectron2's weights.
    weights = out / "convert" / f"backbone.{config.convert.format}"
    words = (out / "pretrain/checkpoint.pth", weights, "--branch", config.convert.branch)
    stages.append(
        Stage(
            name="convert",
            command=call("tools/convert_to_d2.py", *words),
            outputs=(f"convert/{weights.name}", "convert/backbone.json"),
            owns=("convert",),
            products=(f"convert/{weights.name}",),
            upstream=("pretrain",),
            config={"branch": config.convert.branch, "format": config.convert.format},
            code_version=CODE_VERSIONS["convert"],
            libraries=DETECTION_LIBRARIES,
        )
    )

    # Detection: all arms of a seed before the next seed, so that pairs can soon be compared.
    own_yaml = find_config(root, detection.config)
    options = flags(detection.options)
    for key, value in detection.overrides.items():
        options += [key, str(value)]  # Detectron2 reads Python's own spelling.
    for seed, arm in itertools.product(range(detection.seeds), detection.arms):
        is_random = arm.startswith("random")
        words = [
            *("random" if is_random else weights, "--config", own_yaml, "--data", dataset),
            *("--out", out / "detection" / arm, "--seeds", str(seed)),
            *(["--freeze"] if arm.endswith("_frozen") else []),
            *options,
        ]
        folder = f"detection/{arm}/seed-{seed}"
        stages.append(
            Stage(
                name=f"{arm}/seed-{seed}",
                command=call("tools/train_voc.sh", *words),
                outputs=(f"{folder}/result.json",),
                owns=(folder,),
                upstream=("data",) * made + ("convert",) * (not is_random),
                files=(own_yaml, *config_bases(own_yaml), *(() if made else (dataset,))),
                config={"arm": arm, "seed": seed, "overrides": detection.overrides}
                | {"options": detection.options},
                code_version=CODE_VERSIONS["detection"],
                libraries=DETECTION_LIBRARIES,
                resumable=True,
                group="detection",
            )
        )

    needs_weights = any(arm.startswith("pretrained") for arm in detection.arms)
    read = [stage.name for stage in stages if stage.name != "convert" or needs_weights]
    stages.append(
        Stage(
            name="report",
            command=call("pipeline/report/report.py", out),
            outputs=("report.html",),
            owns=("report.html",),
            upstream=tuple(read),
            config={"pipeline": to_plain(config)},
            code_version=CODE_VERSIONS["report"],
            libraries=("jinja2", "matplotlib", "pillow"),
        )
    )
    return stages


def dataset_folder(config: PipelineConfig, out: Path) -> Path:
    """Return the VOC-layout set that detection is trained and tested on."""
    return out / "data" if config.data.dataset is None else Path(config.data.dataset).resolve()


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
