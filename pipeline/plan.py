"""From an experiment's settings to its stages: commands, inputs, outputs, what decides them.

Each stage leaves a JSON file.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import dotted, find_config, read_yaml, read_yaml_with_bases, to_plain
from common.errors import UserError
from common.files import (
    Form,
    has_form,
    read_json_or_none,
    read_record_or_none,
    sha256_of,
    walk,
    write_json,
)
from common.provenance import library_version
from common.resnet import TORCHVISION_CARD
from pipeline.config import FROZEN, RANDOM, PipelineConfig

FORMAT = "fa-stage-2"
RUN_FILE = "experiment.json"
"""What is known of a run as a whole; a folder that holds one is a run's."""
_RUN_FACTS: Form = {"name": str, "dataset": str, "config": dict, "plan": list, "command": list}
"""Older versions may lack some."""


@dataclass(frozen=True)
class Stage:
    """One process of an experiment and everything that its result depends on.

    Attributes:
        name: Of its record and its log; slashes make folders.
        command: Argument list; never passed to a shell.
        outputs: Paths relative to the run's folder that must exist when the stage is finished.
        owns: Paths relative to the run's folder that are removed before a fresh start.
        code_version: Raised by hand when a change of the code changes what the stage makes.
        products: Paths relative to the run's folder whose bytes count for the stages that read this
            one; `outputs` if empty. A stage that runs again and makes the same changes nothing.
        upstream: Names of the stages that this one reads.
        files: Inputs from outside: files count by content, folders by their listing.
        config: The settings that this stage sees.
        libraries: Distributions whose versions count.
        resumable: Whether the same command continues an interrupted run of the same key.
        group: Stages of one group may run side by side, each with its share of the cores. Empty:
            runs alone.
        check: Command that checks the stage's whole input and prints what it would do as JSON.
        kind: Of the same kind, stages take about the same time.
        label: In messages, beside the name.
    """

    name: str
    command: tuple[str, ...]
    outputs: tuple[str, ...]
    owns: tuple[str, ...]
    code_version: int = 1
    products: tuple[str, ...] = ()
    upstream: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()
    resumable: bool = False
    group: str = ""
    check: tuple[str, ...] = ()
    kind: str = ""
    label: str = ""

    @property
    def title(self) -> str:
        """Name and label."""
        return f"{self.name} ({self.label})" if self.label else self.name

    def key_parts(self, root: Path, out: Path, made: Mapping[str, str | None]) -> dict[str, Any]:
        """Return what the key hashes, part by part, so that a change can be named.

        Args:
            root: The repository; the command's mentions of it do not count.
            out: The run's folder; the command's mentions of it do not count.
            made: Digests of what the stages before this one made, by name.
        """

        def anonymous(word: str) -> str:
            return word.replace(str(out), "{out}").replace(str(root), "{root}")

        return {
            "command": [anonymous(word) for word in self.command],
            "config": json.loads(json.dumps(self.config, sort_keys=True, default=str)),
            "code": {"version": self.code_version},
            "upstream": {name: made[name] for name in self.upstream},
            "files": {anonymous(str(path)): input_digest(path) for path in self.files},
            "libraries": {name: library_version(name) for name in self.libraries},
        }

    def product_digest(self, out: Path) -> str:
        """Return a hash of the bytes that the finished stage made."""
        total = hashlib.sha256()
        for name in self.products or self.outputs:
            path = out / name
            files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
            for file in files:
                total.update(file.relative_to(out).as_posix().encode() + b"\0")
                total.update(sha256_of(file).encode())
        return total.hexdigest()


# -- keys -----------------------------------------------------------------------------------------


def digest(parts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the parts in one canonical spelling."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def input_digest(path: Path) -> str | None:
    """Return a hash of a file's bytes or of a folder's names, sizes and times; None if missing."""
    if path.is_file():
        return sha256_of(path)
    if not path.is_dir():
        return None
    total = hashlib.sha256()
    for file in walk(path):
        status = file.stat() if file.exists() else file.lstat()  # a link that leads nowhere
        entry = (file.relative_to(path).as_posix(), status.st_size, status.st_mtime_ns)
        total.update(repr(entry).encode())
    return total.hexdigest()


def without_places(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts with the digests of inputs instead of their paths: a moved input is the same."""
    known = {path: value for path, value in parts.get("files", {}).items() if value}

    def placeless(word: str) -> str:
        for path in sorted(known, key=len, reverse=True):
            word = word.replace(path, known[path])
        return word

    files = sorted(known.get(path, path) for path in parts.get("files", {}))
    command = [placeless(word) for word in parts.get("command", ())]
    return {**parts, "command": command, "files": files}


def explain(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say what differs between the parts of two keys: at most three settings, inputs, libraries."""
    before, after = dotted(old), dotted(new)
    changes = []
    for key in sorted((before.keys() | after.keys()) - {"command"}):
        if before.get(key) != after.get(key):
            is_hash = key.startswith(("upstream.", "files."))
            changes.append(key if is_hash else f"{key} {before.get(key)} -> {after.get(key)}")
    return f"changed: {', '.join(changes[:3] or ['command'])}" + ", .." * (len(changes) > 3)


# -- the records of a run's folder ----------------------------------------------------------------


class StageStore:
    """`stages/NAME.json` for each stage and `experiment.json`; each change is written at once.

    Attributes:
        run: Content of `experiment.json`: name, plan, config, command, versions ..
        stages: The record of each stage by name.
        damaged: Stages whose record is there but cannot be read; RUN_FILE if that cannot.
    """

    def __init__(self, out: Path) -> None:
        """Read what `out` holds; nothing is written yet.

        Raises:
            UserError: If a record is of another version.
        """
        self.out = out
        self.load()

    def load(self) -> None:
        """Read the files again."""
        self.damaged: set[str] = set()
        self.run: dict[str, Any] = {}
        self.stages: dict[str, dict[str, Any]] = {}
        if (self.out / RUN_FILE).exists():
            self.run = self._read(RUN_FILE, self.out / RUN_FILE, {"format": str}) or {}
        # What is there of the facts of the run has to be of the right kinds.
        there = {key: kind for key, kind in _RUN_FACTS.items() if key in self.run}
        is_sound = has_form(self.run, there) and all(
            isinstance(word, str) for key in ("plan", "command") for word in self.run.get(key, ())
        )
        if not is_sound:
            self.damaged.add(RUN_FILE)
            self.run = {}
        folder = self.out / "stages"
        for path in sorted(folder.rglob("*.json")):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if record := self._read(name, path, {"format": str, "status": str}):
                self.stages[name] = record

    def _read(self, name: str, path: Path, form: Form) -> dict[str, Any] | None:
        record = read_record_or_none(path, form)
        if record is None:
            self.damaged.add(name)
        elif record["format"] != FORMAT:
            raise UserError(
                f"{path} is not of this version; move {self.out} away or choose another --out"
            )
        return record

    def open_run(self, name: str, **facts: Any) -> None:
        """Record the experiment's name and what is known about this call."""
        self.run |= {"format": FORMAT, "name": name, **facts, "called": now()}
        write_json(self.out / RUN_FILE, self.run)

    def update(self, stage: str, **facts: Any) -> None:
        """Set facts of a stage and write its file if something changes."""
        old = self.stages.get(stage, {})
        new = {"format": FORMAT} | old | facts
        if new != old:
            self.stages[stage] = new
            write_json(self.out / "stages" / f"{stage}.json", new)


def read_run(out: Path) -> dict[str, Any]:
    """Content of `experiment.json`, and `stages`: the record of each stage; empty without a run.

    Raises:
        UserError: If `experiment.json` is damaged.
    """
    store = StageStore(out)
    if RUN_FILE in store.damaged:
        raise UserError(f"{out / RUN_FILE}: is damaged; the command of this run writes it anew")
    return store.run | {"stages": store.stages, "damaged": sorted(store.damaged)}


def now() -> str:
    """Return the time of day with the zone, to the second."""
    return datetime.datetime.now(datetime.UTC).astimezone().isoformat(timespec="seconds")


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
    data, detection, variants = config.data, config.detection, config.all_variants
    is_made = data.kind != "existing"
    stages: list[Stage] = []

    def call(kind: str, *words: Any) -> tuple[str, ...]:
        script = KINDS[kind][0]
        program = sys.executable if script.endswith(".py") else "bash"
        return (program, str(root / script), *map(str, words))

    def add(kind: str, name: str, words: list[Any], check: list[Any] | None, **facts: Any) -> None:
        # Data that an earlier stage makes is not there yet: then only settings are checked.
        has_data = all(name.startswith("convert") for name in facts.get("upstream", ()))
        how = ("--check", "all" if has_data else "settings", "--json")
        stages.append(
            Stage(
                name=name, kind=kind, command=call(kind, *words),
                code_version=KINDS[kind][1], libraries=KINDS[kind][2],
                check=() if check is None else call(kind, *check, *how), **facts,
            )
        )  # fmt: skip

    def add_data(seed: int | None) -> dict[str, Path]:
        """The data set and its shards, of a seed or for all; returns the shards by name.

        A name is that of the stage without the seed.
        """
        # The data set, if it is not the user's own.
        tail = "" if seed is None else f"/seed-{seed}"
        made = f"data{tail}"
        if is_made:
            options = data.options | ({} if seed is None else {"seed": seed})
            if data.kind == "photos" and seed is not None:
                options["split_seed"] = seed
            words = [data.kind, out / made, *flags(options)]
            add(
                "data", made, words, words,
                outputs=(f"{made}/dataset.json",), owns=(made, f"{made}.partial"),
                products=(made,), config={"data": {"kind": data.kind, "options": options}},
            )  # fmt: skip

        # Shards of the pool (maybe in parts) and of the probe, unless they are packed already.
        pack = flags(config.shards.options)
        probe = flags({"labels": "folders"} | config.probes.options)
        if is_made:
            pool, train, val = (out / made / x for x in ("pool", "probe/train", "probe/val"))
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
                place = name + tail
                packed[name] = out / place
                words = [source, out / place, *options]
                add(
                    "shards", place, words, words,
                    outputs=(f"{place}/index.json",), owns=(place,), upstream=(made,) * is_made,
                    files=() if is_made else (source,), config={"options": options},
                    resumable=True, group="packing",
                )  # fmt: skip
        return packed

    def shards_of(packed: Mapping[str, Path], names: Sequence[str]) -> dict[str, tuple[Any, ...]]:
        """What a stage that reads these shards follows: stages that pack them, or ready indexes."""
        stage_of = {name: packed[name].relative_to(out).as_posix() for name in names
                    if packed[name].is_relative_to(out)}  # fmt: skip
        ready = (packed[name] / "index.json" for name in names if name not in stage_of)
        return {"upstream": tuple(stage_of.values()), "files": tuple(ready)}

    has_own_data = config.seeds.data
    packed = {} if has_own_data else add_data(None)
    detector = find_config(detection.config, "detection").resolve() if config.arms else None
    detector_options = detection_words(config)
    backbones: dict[tuple[str, int], tuple[Path | str, tuple[str, ...]]] = {}
    for seed in config.all_seeds:
        if has_own_data:
            packed = add_data(seed)
        both = [name for name in ("probe_train", "probe_val") if name in packed]
        probes = {f"eval.{name}": str(packed[name]) for name in both}

        # Backbones: pretrained here, or given; those that have no card are converted.
        for variant in variants.values():
            own_seed = seed if config.seeds.pretraining and variant.weights is None else None
            if "{seed}" in (variant.weights or ""):
                own_seed = seed
            if variant.weights == RANDOM or (own_seed is None and seed > config.seeds.first):
                one = (variant.name, config.seeds.first)
                backbones[variant.name, seed] = backbones.get(one, (RANDOM, ()))
                continue
            is_plain = variant.name == "pretrained" and variant.weights is None and own_seed is None
            tail = "" if is_plain else f"/{variant.name}"
            tail += "" if own_seed is None else f"/seed-{own_seed}"
            if variant.weights is None:
                weights = out / f"pretrain{tail}/checkpoint.pth"
                own_yaml = find_config(
                    variant.config or config.pretrain.config, "pretrain"
                ).resolve()
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
                pictures = shards_of(packed, [*shares, *both])
                group = "evaluation" if config.pretrain.side_by_side else ""
                add(
                    "pretrain", f"pretrain{tail}", [own_yaml, *words, "--resume"],
                    [own_yaml, *first],
                    outputs=(f"pretrain{tail}/checkpoint.pth", f"pretrain{tail}/summary.json"),
                    owns=(f"pretrain{tail}",), products=(f"pretrain{tail}/checkpoint.pth",),
                    upstream=pictures["upstream"], files=(own_yaml, *pictures["files"]),
                    config={"overrides": overrides, "pool": variant.pool},
                    resumable=True, group=group, label=variant.label,
                )  # fmt: skip
                from_here = {"upstream": (f"pretrain{tail}",)}
                if "linear" in config.evaluations:
                    workers = (dotted(read_yaml(own_yaml)) | overrides).get("data.num_workers", 2)
                    probe = shards_of(packed, both)
                    add(
                        "linear", f"linear{tail}",
                        [weights, "--train", packed["probe_train"], "--val", packed["probe_val"],
                         "--out", out / f"linear{tail}", "--protocol", "cached", "--resume",
                         f"num_workers={workers}"], None,
                        outputs=(f"linear{tail}/linear.json",), owns=(f"linear{tail}",),
                        upstream=(f"pretrain{tail}", *probe["upstream"]), files=probe["files"],
                        resumable=True, group="evaluation", label=variant.label,
                    )  # fmt: skip
                branch = ["--branch", config.convert.branch]
            else:
                weights = Path(variant.weights.replace("{seed}", str(seed))).resolve()
                if not weights.is_file():
                    raise UserError(f"variant {variant.name}: {weights} does not exist")
                from_here, branch = {"files": (weights,)}, []
                card = read_json_or_none(weights.with_suffix(".json"))
                card_format = card.get("format") if isinstance(card, dict) else None
                if weights.with_suffix(".json").is_file() and card_format != TORCHVISION_CARD:
                    backbones[variant.name, seed] = (weights, ())
                    continue
            converted = out / f"convert{tail}/backbone.{config.convert.format}"
            backbones[variant.name, seed] = (converted, (f"convert{tail}",))
            if any(arm.removesuffix(FROZEN) == variant.name for arm in config.arms):
                words = [weights, converted, *branch]
                add(
                    "convert", f"convert{tail}", words, words if variant.weights else None,
                    outputs=(f"convert{tail}/{converted.name}", f"convert{tail}/backbone.json"),
                    owns=(f"convert{tail}",), products=(f"convert{tail}/{converted.name}",),
                    config={"branch": config.convert.branch, "format": config.convert.format},
                    group="evaluation", **from_here,
                )  # fmt: skip

        # Detection: all arms of a seed before the next seed, so that pairs can soon be compared.
        for arm in config.arms:
            assert detector is not None
            weights, upstream = backbones[arm.removesuffix(FROZEN), seed]
            dataset = dataset_folder(config, out, seed)
            shared = ["--config", detector, "--data", dataset, "--out"]
            freeze = ["--freeze"] * arm.endswith(FROZEN)
            files = [detector, *read_yaml_with_bases(detector)[1]]
            files += [] if is_made else [dataset]
            made_by = [dataset.relative_to(out).as_posix()] if is_made else []
            files += [weights] if isinstance(weights, Path) and not upstream else []
            place = f"detection/{arm}"
            add(
                "detection", f"{arm}/seed-{seed}",
                [weights, *shared, out / place, "--seeds", seed, "--arm", arm, *freeze,
                 *detector_options],
                [RANDOM if upstream else weights, *shared, out / "detection", *detector_options],
                outputs=(f"{place}/seed-{seed}/result.json",), owns=(f"{place}/seed-{seed}",),
                upstream=(*made_by, *upstream), files=tuple(files),
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
