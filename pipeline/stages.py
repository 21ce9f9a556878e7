"""From an experiment's settings to its stages: commands, inputs, outputs, what decides them."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config import dotted, find_config, read_yaml, read_yaml_with_bases, to_plain
from common.errors import UserError
from common.files import read_json_or_none
from common.resnet import TORCHVISION_CARD
from pipeline.config import FROZEN, RANDOM, PipelineConfig, Variant
from pipeline.plan import Stage

_OPENCV = ("opencv-python", "opencv-python-headless")
_PRETRAIN = ("torch", "torchvision", "numpy", *_OPENCV, "simplejpeg")
_DETECTION = ("torch", "torchvision", "numpy", "pillow", "detectron2")
_PICTURES = ("numpy", *_OPENCV, "pillow")
KINDS = {
    "data": ("tools/make_dataset.py", 1, _PICTURES),
    "shards": ("tools/make_shards.py", 2, _PICTURES),
    "pretrain": ("tools/pretrain.sh", 1, _PRETRAIN),
    "linear": ("tools/linear_eval.py", 1, _PRETRAIN),
    "convert": ("tools/convert_to_d2.py", 1, _DETECTION),
    "detection": ("tools/train_voc.sh", 2, _DETECTION),
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
    planner, backbones = _Planner(config, root, out), dict[str, tuple[Path | str, str | None]]()
    packed = {} if config.seeds.data else planner.add_data(None)
    for seed in config.all_seeds:
        if config.seeds.data:
            packed = planner.add_data(seed)
        for variant in config.all_variants.values():
            is_trained = config.seeds.pretraining and variant.weights is None
            has_seed = is_trained or "{seed}" in (variant.weights or "")
            if variant.weights == RANDOM:
                backbones[variant.name] = RANDOM, None
            elif has_seed or seed == config.seeds.first:  # else that of the first seed
                own_seed = seed if has_seed else None
                backbones[variant.name] = planner.add_backbone(variant, own_seed, packed)
        # All arms of a seed before the next seed, so that pairs can soon be compared.
        for arm in config.arms:
            planner.add_detector(arm, seed, *backbones[arm.removesuffix(FROZEN)])
    # The page of an unfinished run is written by hand or after a failure, so that it owns nothing.
    planner.add(
        "report", "report", [out], None, outputs=("report.html",), owns=(),
        upstream=tuple(stage.name for stage in planner.stages),
        config={"pipeline": to_plain(config)},
    )  # fmt: skip
    return planner.stages


class _Planner:
    """Adds one stage after another to `stages`."""

    def __init__(self, config: PipelineConfig, root: Path, out: Path) -> None:
        self.config, self.root, self.out = config, root, out
        self.is_made = config.data.kind != "existing"
        self.stages: list[Stage] = []

    def add(
        self, kind: str, name: str, words: list[Any], check: list[Any] | None, **facts: Any
    ) -> None:
        """Add a stage.

        Args:
            kind: One of `KINDS`.
            name: Of the stage.
            words: Arguments of its program.
            check: Arguments of its check; None: has none.
            facts: Other attributes of the stage.
        """
        # Data that an earlier stage makes is not there yet: then only settings are checked.
        has_data = all(name.startswith("convert") for name in facts.get("upstream", ()))
        how = ("--check", "all" if has_data else "settings", "--json")
        script, code_version, libraries = KINDS[kind]
        program = (sys.executable if script.endswith(".py") else "bash", str(self.root / script))
        self.stages.append(
            Stage(
                name=name, kind=kind, command=(*program, *map(str, words)),
                code_version=code_version, libraries=libraries,
                check=() if check is None else (*program, *map(str, check), *how), **facts,
            )
        )  # fmt: skip

    # -- data -------------------------------------------------------------------------------------

    def add_data(self, seed: int | None) -> dict[str, Path]:
        """Add the data set and its shards, of a seed or for all.

        Returns:
            Folders of the shards by the name of their stage without the seed.
        """
        data, tail = self.config.data, "" if seed is None else f"/seed-{seed}"
        made = f"data{tail}"
        if self.is_made:
            options = data.options | ({} if seed is None else {"seed": seed})
            if data.kind == "photos" and seed is not None:
                options["split_seed"] = seed
            words = [data.kind, self.out / made, *flags(options)]
            self.add(
                "data", made, words, words,
                outputs=(f"{made}/dataset.json",), owns=(made, f"{made}.partial"),
                products=(made,), config={"data": {"kind": data.kind, "options": options}},
            )  # fmt: skip
        packed: dict[str, Path] = {}
        for name, (source, options) in self._sources(made).items():
            packed[name] = source
            if self.is_made or not (source / "index.json").is_file():  # else they are shards
                place = name + tail
                packed[name] = self.out / place
                words = [source, self.out / place, *options]
                self.add(
                    "shards", place, words, words,
                    outputs=(f"{place}/index.json",), owns=(place,),
                    upstream=(made,) * self.is_made, files=() if self.is_made else (source,),
                    config={"options": options}, resumable=True, group="packing",
                )  # fmt: skip
        return packed

    def _sources(self, made: str) -> dict[str, tuple[Path, list[str]]]:
        """Folders of the pool (maybe in parts) and of the probe, and options of their packing."""
        config, data = self.config, self.config.data
        if not any(variant.weights is None for variant in config.all_variants.values()):
            return {}
        pack = flags(config.shards.options)
        probe = flags({"labels": "folders"} | config.probes.options)
        if self.is_made:
            pool, train, val = (self.out / made / x for x in ("pool", "probe/train", "probe/val"))
        else:
            own = (data.shards or data.pool, data.probe_train, data.probe_val)
            pool, train, val = (Path(path).resolve() if path else None for path in own)
            pack += flags({"split": data.pool_split})
        sources: dict[str, tuple[Path | None, list[str]]] = {"shards": (pool, pack)}
        if data.shares:
            del sources["shards"]
            for low, high in itertools.pairwise([0.0, *data.shares, 1.0]):
                sources[f"shards/{high:g}"] = (pool, [*pack, "--part", f"{low:g}:{high:g}"])
        sources |= {"probe_train": (train, probe), "probe_val": (val, probe)}
        return {name: (source, words) for name, (source, words) in sources.items() if source}

    def _reads(self, packed: Mapping[str, Path], names: Sequence[str]) -> dict[str, Any]:
        """What a stage that reads these shards follows: stages that pack them, or ready indexes."""
        stage_of = {name: packed[name].relative_to(self.out).as_posix() for name in names
                    if packed[name].is_relative_to(self.out)}  # fmt: skip
        ready = (packed[name] / "index.json" for name in names if name not in stage_of)
        return {"upstream": tuple(stage_of.values()), "files": tuple(ready)}

    # -- backbones --------------------------------------------------------------------------------

    def add_backbone(
        self, variant: Variant, seed: int | None, packed: Mapping[str, Path]
    ) -> tuple[Path, str | None]:
        """Add the stages of a variant: it is pretrained here, or given; without a card, converted.

        Args:
            variant: Which one; not the random one.
            seed: Of pretraining, and of `{seed}` in the weights; None: one backbone for all seeds.
            packed: The shards.
        Returns:
            The weights for detection, and the stage that makes them; None: they are given.
        """
        config, out = self.config, self.out
        is_plain = variant.name == "pretrained" and variant.weights is None and seed is None
        tail = "" if is_plain else f"/{variant.name}"
        tail += "" if seed is None else f"/seed-{seed}"
        if variant.weights is None:
            weights = out / f"pretrain{tail}/checkpoint.pth"
            own_yaml = find_config(variant.config or config.pretrain.config, "pretrain").resolve()
            overrides = config.pretrain.overrides | variant.overrides
            self._add_pretraining(variant, seed, tail, own_yaml, overrides, packed)
            if "linear" in config.evaluations:
                workers = (dotted(read_yaml(own_yaml)) | overrides).get("data.num_workers", 2)
                probe = self._reads(packed, ["probe_train", "probe_val"])
                self.add(
                    "linear", f"linear{tail}",
                    [weights, "--train", packed["probe_train"], "--val", packed["probe_val"],
                     "--out", out / f"linear{tail}", "--protocol", "cached", "--resume",
                     f"num_workers={workers}"], None,
                    outputs=(f"linear{tail}/linear.json",), owns=(f"linear{tail}",),
                    upstream=(f"pretrain{tail}", *probe["upstream"]), files=probe["files"],
                    resumable=True, group="evaluation", label=variant.label,
                )  # fmt: skip
            source: dict[str, Any] = {"upstream": (f"pretrain{tail}",)}
            branch = ["--branch", config.convert.branch]
        else:
            weights = Path(variant.weights.replace("{seed}", str(seed))).resolve()
            if not weights.is_file():
                raise UserError(f"variant {variant.name}: {weights} does not exist")
            card = read_json_or_none(weights.with_suffix(".json"))
            card_format = card.get("format") if isinstance(card, dict) else None
            if weights.with_suffix(".json").is_file() and card_format != TORCHVISION_CARD:
                return weights, None
            source, branch = {"files": (weights,)}, []
        converted = out / f"convert{tail}/backbone.{config.convert.format}"
        if any(arm.removesuffix(FROZEN) == variant.name for arm in config.arms):
            words = [weights, converted, *branch]
            self.add(
                "convert", f"convert{tail}", words, words if variant.weights else None,
                outputs=(f"convert{tail}/{converted.name}", f"convert{tail}/backbone.json"),
                owns=(f"convert{tail}",), products=(f"convert{tail}/{converted.name}",),
                config={"branch": config.convert.branch, "format": config.convert.format},
                group="evaluation", **source,
            )  # fmt: skip
        return converted, f"convert{tail}"

    def _add_pretraining(
        self, variant: Variant, seed: int | None, tail: str, own_yaml: Path,
        overrides: Mapping[str, Any], packed: Mapping[str, Path],
    ) -> None:  # fmt: skip
        data, place = self.config.data, f"pretrain{tail}"
        shares = [f"shards/{share:g}" for share in (*data.shares, 1.0)
                  if share <= variant.pool] if data.shares else ["shards"]  # fmt: skip
        folders = [str(packed[name]) for name in shares]
        probes = [name for name in ("probe_train", "probe_val") if name in packed]
        settings: dict[str, Any] = {
            "out": str(self.out / place),
            "data.shards": folders if data.shares else folders[0],
        } | {f"eval.{name}": str(packed[name]) for name in probes}
        settings |= {} if seed is None else {"seed": seed}
        clash = sorted(settings.keys() & overrides.keys())
        if clash:
            raise UserError(f"pretrain.overrides.{clash[0]} is set by the pipeline; leave it out")
        words = [  # JSON is YAML, too
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in {**settings, **overrides}.items()
        ]
        pictures = self._reads(packed, [*shares, *probes])
        self.add(
            "pretrain", place, [own_yaml, *words, "--resume"],
            [own_yaml, *(word for word in words if not word.startswith(("out=", "seed=")))],
            outputs=(f"{place}/checkpoint.pth", f"{place}/summary.json"),
            owns=(place,), products=(f"{place}/checkpoint.pth",),
            upstream=pictures["upstream"], files=(own_yaml, *pictures["files"]),
            config={"overrides": overrides, "pool": variant.pool}, resumable=True,
            group="evaluation" if self.config.pretrain.side_by_side else "", label=variant.label,
        )  # fmt: skip

    # -- detection --------------------------------------------------------------------------------

    def add_detector(self, arm: str, seed: int, weights: Path | str, made_by: str | None) -> None:
        """Add the fine-tuning and evaluation of one arm.

        Args:
            arm: Name of a variant, maybe frozen.
            seed: Of the detector.
            weights: Of the backbone.
            made_by: The stage that converts them; None: they are given.
        """
        config, detection = self.config, self.config.detection
        detector = find_config(detection.config, "detection").resolve()
        dataset = dataset_folder(config, self.out, seed)
        options, place = detection_words(config), f"detection/{arm}"
        shared = ["--config", detector, "--data", dataset, "--out"]
        files = [detector, *read_yaml_with_bases(detector)[1]]
        files += [] if self.is_made else [dataset]
        files += [weights] if isinstance(weights, Path) and made_by is None else []
        upstream = [dataset.relative_to(self.out).as_posix()] if self.is_made else []
        upstream += [] if made_by is None else [made_by]
        self.add(
            "detection", f"{arm}/seed-{seed}",
            [weights, *shared, self.out / place, "--seeds", seed, "--arm", arm,
             *["--freeze"] * arm.endswith(FROZEN), *options],
            [RANDOM if made_by else weights, *shared, self.out / "detection", *options],
            outputs=(f"{place}/seed-{seed}/result.json",), owns=(f"{place}/seed-{seed}",),
            upstream=tuple(upstream), files=tuple(files),
            config={"arm": arm, "seed": seed, "overrides": detection.overrides}
            | {"options": detection.options},
            resumable=True, group="evaluation",
        )  # fmt: skip


def detection_words(config: PipelineConfig) -> list[str]:
    """Options and overrides of `tools/train_voc.sh` that all arms share."""
    words = flags(joined_options(config))
    for key, value in config.detection.overrides.items():
        words += [key, str(value)]  # Detectron2 reads Python's own spelling.
    return [*words, *config.detection.words]


def joined_options(config: PipelineConfig) -> dict[str, Any]:
    """Options of `tools/train_voc.sh`, lists as it takes them."""
    options = dict(config.detection.options)
    for key, separator in _JOINED_BY.items():
        if isinstance(options.get(key), list):
            options[key] = separator.join(map(str, options[key]))
    return options


def dataset_folder(config: PipelineConfig, out: Path, seed: int) -> Path:
    """Return the labelled set that detection is trained and tested on."""
    own = config.data.dataset
    if own is None:
        return out / "data" / f"seed-{seed}" if config.seeds.data else out / "data"
    return Path(own.replace("{seed}", str(seed))).resolve()


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
