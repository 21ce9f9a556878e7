"""From a pipeline's settings to its stages: commands, inputs, outputs and what decides them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import read_yaml, to_plain
from common.errors import UserError
from pipeline.config import Arm, PipelineConfig
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
    made = config.data.kind != "existing"
    stages = [_data(config, root, out)] if made else []
    stages += _shards(config, root, out)
    stages.append(_pretrain(config, root, out, [stage.name for stage in stages]))
    stages.append(_convert(config, root, out))
    detection = [
        _detection(config, root, out, arm, seed)
        for seed in range(config.detection.seeds)
        for arm in config.detection.arms
    ]
    needs_weights = any(arm.startswith("pretrained") for arm in config.detection.arms)
    stages += detection
    read = [stage.name for stage in stages if stage.name != "convert" or needs_weights]
    stages.append(_report(config, root, out, read))
    return stages


def find_config(root: Path, name: str) -> Path:
    """Return a config file's path, given relative to the repository or to the working folder.

    Raises:
        UserError: If it is in neither.
    """
    for candidate in (root / name, Path(name)):
        if candidate.is_file():
            return candidate.resolve()
    raise UserError(f"config file {name} does not exist, neither in {root} nor here")


def dataset_folder(config: PipelineConfig, out: Path) -> Path:
    """Return the VOC-layout set that detection is trained and tested on."""
    if config.data.dataset is not None:
        return Path(config.data.dataset).resolve()
    return out / "data"


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


def yaml_word(value: Any) -> str:
    """Return a value as a command line word that YAML reads back: None becomes null."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _call(root: Path, script: str, *words: str | Path) -> tuple[str, ...]:
    program = sys.executable if script.endswith(".py") else "bash"
    return (program, str(root / script), *map(str, words))


def _data(config: PipelineConfig, root: Path, out: Path) -> Stage:
    options = flags(config.data.options)
    return Stage(
        name="data",
        command=_call(root, "tools/make_dataset.py", config.data.kind, out / "data", *options),
        outputs=("data/dataset.json",),
        owns=("data", "data.partial"),
        products=("data",),
        config={"data": to_plain(config)["data"]},
        code_version=CODE_VERSIONS["data"],
        libraries=PICTURE_LIBRARIES,
    )


def _shards(config: PipelineConfig, root: Path, out: Path) -> list[Stage]:
    data, made = config.data, config.data.kind != "existing"
    pack, probe = flags(config.shards.options), flags(config.probes.options)
    if made:
        pool, train, val = (out / "data" / name for name in ("pool", "probe/train", "probe/val"))
    else:
        own = (data.pool, data.probe_train, data.probe_val)
        pool, train, val = (Path(path).resolve() if path else None for path in own)
        pack += flags({"split": data.pool_split})
    sources = {"shards": (pool, pack), "probe_train": (train, probe), "probe_val": (val, probe)}
    return [
        Stage(
            name=name,
            command=_call(root, "tools/make_shards.py", source, out / name, *words),
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


def _pretrain(config: PipelineConfig, root: Path, out: Path, before: list[str]) -> Stage:
    own_yaml = find_config(root, config.pretrain.config)
    own_shards = config.data.shards
    shards = out / "shards" if own_shards is None else Path(own_shards).resolve()
    settings: dict[str, Any] = {"out": out / "pretrain", "data.shards": shards}
    if "probe_train" in before:
        settings["eval.probe_train"] = out / "probe_train"
        settings["eval.probe_val"] = out / "probe_val"
    clash = sorted(settings.keys() & config.pretrain.overrides.keys())
    if clash:
        raise UserError(f"pretrain.overrides.{clash[0]} is set by the pipeline; leave it out")
    settings |= config.pretrain.overrides
    words = [f"{key}={yaml_word(value)}" for key, value in settings.items()]
    return Stage(
        name="pretrain",
        command=_call(root, "tools/pretrain.sh", own_yaml, *words),
        outputs=("pretrain/checkpoint.pth", "pretrain/summary.json"),
        owns=("pretrain",),
        products=("pretrain/checkpoint.pth",),
        upstream=tuple(name for name in before if name != "data"),
        files=(own_yaml,) if own_shards is None else (own_yaml, shards / "index.json"),
        config={"overrides": config.pretrain.overrides},
        code_version=CODE_VERSIONS["pretrain"],
        libraries=PRETRAIN_LIBRARIES,
        resumable=True,
        resume_arguments=("--resume",),
    )


def weights_path(config: PipelineConfig, out: Path) -> Path:
    """Return where the converted weights are."""
    return out / "convert" / f"backbone.{config.convert.format}"


def _convert(config: PipelineConfig, root: Path, out: Path) -> Stage:
    weights = weights_path(config, out)
    words = (out / "pretrain/checkpoint.pth", weights, "--branch", config.convert.branch)
    return Stage(
        name="convert",
        command=_call(root, "tools/convert_to_d2.py", *words),
        outputs=(f"convert/{weights.name}", "convert/backbone.json"),
        owns=("convert",),
        products=(f"convert/{weights.name}",),
        upstream=("pretrain",),
        config={"branch": config.convert.branch, "format": config.convert.format},
        code_version=CODE_VERSIONS["convert"],
        libraries=DETECTION_LIBRARIES,
    )


def _detection(config: PipelineConfig, root: Path, out: Path, arm: Arm, seed: int) -> Stage:
    own_yaml = find_config(root, config.detection.config)
    weights = "random" if arm.startswith("random") else str(weights_path(config, out))
    made = config.data.kind != "existing"
    pairs = [
        word
        for key, value in config.detection.overrides.items()
        for word in (key, str(value))  # Detectron2 reads Python's own spelling.
    ]
    dataset = dataset_folder(config, out)
    words = [
        *(weights, "--config", str(own_yaml), "--data", str(dataset)),
        *("--out", str(out / "detection" / arm), "--seeds", str(seed)),
        *(["--freeze"] if arm.endswith("_frozen") else []),
        *flags(config.detection.options),
        *pairs,
    ]
    folder = f"detection/{arm}/seed-{seed}"
    reads_convert = ("convert",) if weights != "random" else ()
    return Stage(
        name=f"{arm}/seed-{seed}",
        command=_call(root, "tools/train_voc.sh", *words),
        outputs=(f"{folder}/result.json",),
        owns=(folder,),
        upstream=(("data",) if made else ()) + reads_convert,
        files=(own_yaml, *config_bases(own_yaml), *(() if made else (dataset,))),
        config={"arm": arm, "seed": seed, "overrides": config.detection.overrides}
        | {"options": config.detection.options},
        code_version=CODE_VERSIONS["detection"],
        libraries=DETECTION_LIBRARIES,
        resumable=True,
        group="detection",
    )


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


def _report(config: PipelineConfig, root: Path, out: Path, read: list[str]) -> Stage:
    return Stage(
        name="report",
        command=_call(root, "pipeline/report/report.py", out),
        outputs=("report.html",),
        owns=("report.html",),
        upstream=tuple(read),
        config={"pipeline": to_plain(config)},
        code_version=CODE_VERSIONS["report"],
        libraries=("jinja2", "matplotlib", "pillow"),
    )
