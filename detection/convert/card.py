"""The cards that travel with weights: OUT.json for programs, OUT.md for people.

Both hold the same facts: what the network expects of its pixels, where it comes from, how its
training is described, what was left out, how the conversion was proved.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from common import provenance
from common.errors import UserError
from common.files import sha256_of, write_json, write_text
from common.resnet import Arch, read_arch
from detection.convert.conventions import D2_CARD, TORCHVISION_CARD, read_any_card
from detection.convert.source import Source

MARK = "<!-- model card of feature-augmented pretraining -->"
UNKNOWN = "not known"
_BUILDERS = {
    Arch(18, 64, 64, 64): "resnet18", Arch(34, 64, 64, 64): "resnet34",
    Arch(50, 64, 64, 256): "resnet50", Arch(101, 64, 64, 256): "resnet101",
    Arch(152, 64, 64, 256): "resnet152", Arch(50, 128, 64, 256): "wide_resnet50_2",
    Arch(101, 128, 64, 256): "wide_resnet101_2",
}  # fmt: skip


def render(card: Mapping[str, Any]) -> str:
    """The card as markdown.

    Args:
        card: From `model_card.build`.
    """
    config = card["pretraining"]["config"]
    sections = [
        f"{MARK}\n# Model card: {_plain(card['weights_file'])}\n\n{_table(_identity(card))}",
        f"## What it expects\n\n{_table(_pixels(card))}",
        f"## How it was trained\n\n{_table(_training(card['pretraining']))}",
        f"## Figures\n\n{_figures(card['pretraining'])}",
        f"## How the conversion was proved\n\n{_proof(card)}",
        f"## What was left out\n\n{_left_out(card)}",
        f"## How to use it\n\n{_usage(card)}",
        f"## Not known\n\n{_not_known(card)}",
    ]
    if config is not None:
        shown = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=90)
        sections.append(
            "## Config of the training\n\nLocations are shortened.\n\n" + _indented(shown)
        )
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


def _identity(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    source, earlier = card["source"], card["made_from"]
    rows = [
        ("Network", f"{read_arch(card['arch'])}, without classifier"),
        ("Format", _code(card["format"])),
        ("SHA-256", _code(card["weights_sha256"])),
        ("Tensors", f"{card['num_tensors']}, and {card['num_counters']} batch counters of "
                    f"{card['num_norms']} norms"),
        ("Converted from", f"{_code(source['file'])} ({_plain(source['layout'])}), "
                           f"SHA-256 {_code(source['sha256'])}"),
        ("Branch", _plain(card["branch"])),
    ]  # fmt: skip
    if earlier is not None:
        rows.append(("Which came from", f"{_code(earlier['file'])} ({_plain(earlier['layout'])}), "
                                        f"SHA-256 {_code(earlier['sha256'])}"))  # fmt: skip
    return rows


def _pixels(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    given, origin = card["preprocessing"], card["origins"]["preprocessing"]
    words = {"assumed": "assumed: the source does not say", "option": "stated by the caller",
             "checkpoint": "from the checkpoint", "card": "from the source's card",
             "config": "from the config.json beside the source"}  # fmt: skip
    if "pixel_mean" in given:
        channels, scale = f"{given['input_format']}, values from 0 to 255", "pixel_"
    else:
        channels, scale = f"{given['order']}, values from 0 to 1", ""
    return [
        ("Channels", channels),
        ("Mean", _numbers(given[f"{scale}mean"])),
        ("Deviation", _numbers(given[f"{scale}std"])),
        ("Where that is from", words[origin]),
        ("Stride", "in the 3x3 convolutions"),
    ]


def _training(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    data, method = known["data"] or {}, known["method"] or {}
    shards = [f"{_code(item['place'])} (weight {_plain(item['weight'])})"
              for item in data.get("shards") or ()]  # fmt: skip
    return [
        ("Data", ", ".join(shards) or UNKNOWN),
        ("Samples", _or_unknown(data.get("num_samples"))),
        ("Fingerprint of the data", _or_unknown(data.get("fingerprint"))),
        ("Objective", _or_unknown(method.get("objective"))),
        ("Feature augmentation", _or_unknown(method.get("feature_augmentation"))),
        ("Architecture", _or_unknown(method.get("architecture"))),
        ("Augmentation of pictures", _or_unknown(method.get("augmentation"))),
        ("Side of a view, pixels", _or_unknown(method.get("image_size"))),
        ("Batch size", _or_unknown(method.get("batch_size"))),
        ("Epochs", _of(known["epoch"], method.get("epochs"))),
        ("Steps", _of(known["step"], known["num_steps"])),
        ("Commit of the code", _or_unknown(known["commit"])),
        ("Device", _or_unknown(known["device"])),
        ("Versions", ", ".join(f"{_plain(name)} {_plain(version)}" for name, version
                               in (known["versions"] or {}).items()) or UNKNOWN),
        ("SHA-256 of the config", _or_unknown(known["config_sha256"])),
        *((f"Stated {key.removeprefix('stated_')}", _plain(value))
          for key, value in known.items() if key.startswith("stated_")),
    ]  # fmt: skip


def _figures(known: Mapping[str, Any]) -> str:
    figures = {key: value for key, value in (known["figures"] or {}).items() if value is not None}
    names = {
        "knn_top1": "kNN top-1 of the features",
        "knn_top1_initial": "kNN top-1 before training",
        "images_per_second": "Pictures per second in training",
        "seconds": "Seconds of training",
        "peak_memory_bytes": "Peak memory in training, bytes",
    }
    rows = [(names.get(key, _plain(key)), f"{value:.6g}") for key, value in figures.items()]
    remarks = "".join(f"\n- {_plain(remark)}" for remark in known["remarks"])
    return (_table(rows) if rows else f"Figures: {UNKNOWN}.") + ("\n" + remarks if remarks else "")


def _proof(card: Mapping[str, Any]) -> str:
    rows = [(stage, f"{value:.1e}") for stage, value in card["stages"].items()]
    versions = ", ".join(f"{name} {value}" for name, value in card["converter"]["versions"].items())
    return (
        "Detectron2's ResNet and a reference ResNet in torchvision's layout got these weights and "
        "the same picture, in float32 and evaluation mode. The file was read back, and every "
        "tensor is equal bit by bit to what was read from the source. Largest difference relative "
        f"to the largest value:\n\n{_table(rows)}\n\n"
        f"Converter: commit {_or_unknown(card['converter']['commit'])}; {versions}."
    )


def _left_out(card: Mapping[str, Any]) -> str:
    reasons = [f"- {number} keys: {_plain(reason)}" for reason, number
               in card["dropped_because"].items()]  # fmt: skip
    reasons += [f"- {number} keys, in the conversion before: {_plain(reason)}" for reason, number
                in card["dropped_earlier"].items()]  # fmt: skip
    missing = card["num_norms"] - card["num_counters"]
    if missing:
        reasons.append(f"- {missing} of {card['num_norms']} norms have no batch counter in the "
                       "source; evaluation does not use it")  # fmt: skip
    for kind, number in card["cast_to_float32"].items():
        exact = "rounded" if kind == "float64" else "without loss"
        reasons.append(f"- {number} tensors were {_plain(kind)} and are float32 now ({exact})")
    reasons += [f"- {_plain(note)}" for note in card["notes"]]
    return "\n".join(reasons) or "Nothing."


def _usage(card: Mapping[str, Any]) -> str:
    name, arch = _plain(card["weights_file"]), read_arch(card["arch"])
    if "pixel_mean" not in card["preprocessing"]:
        return _torchvision_usage(name, arch)
    given = card["preprocessing"]
    query = "?matching_heuristics=True" if name.endswith(".pth") else ""
    lines = ["MODEL:", f'  WEIGHTS: "{name}{query}"', f"  PIXEL_MEAN: {given['pixel_mean']}",
             f"  PIXEL_STD: {given['pixel_std']}", "  RESNETS:", f"    DEPTH: {arch.depth}",
             f"    WIDTH_PER_GROUP: {arch.width_per_group}",
             f"    STEM_OUT_CHANNELS: {arch.stem_channels}",
             f"    RES2_OUT_CHANNELS: {arch.res2_channels}", "    STRIDE_IN_1X1: False",
             "INPUT:", '  FORMAT: "RGB"']  # fmt: skip
    return (
        "With this project: `tools/train_voc.sh` takes the file and compares its card with the "
        "config. With Detectron2 alone, these keys belong together:\n\n"
        f"{_indented(chr(10).join(lines))}"
    )


def _torchvision_usage(name: str, arch: Arch) -> str:
    builder = _BUILDERS.get(arch)
    if builder is None:
        return (
            f"The names are torchvision's, but its builders have no {arch}; "
            "`detection.convert.parity.ReferenceResNet` builds it:\n\n"
            + _indented(f"network = ReferenceResNet(Arch({arch.depth}, {arch.width_per_group}, "
                        f"{arch.stem_channels}, {arch.res2_channels}))\n"
                        f'network.load_state_dict(torch.load("{name}", weights_only=True))')
        )  # fmt: skip
    return "With torchvision, without a classifier:\n\n" + _indented(
        f"network = torchvision.models.{builder}()\nnetwork.fc = torch.nn.Identity()\n"
        f'network.load_state_dict(torch.load("{name}", weights_only=True))'
    )


def _not_known(card: Mapping[str, Any]) -> str:
    known = card["pretraining"]
    known = {**known, "data": (known["data"] or {}).get("shards")}
    labels = {"data": "the training data", "method": "the method", "config": "the config",
              "commit": "the commit of the training code", "figures": "figures of the training",
              "num_steps": "the length of the training"}  # fmt: skip
    missing = [label for key, label in labels.items() if known[key] is None]
    if card["origins"]["preprocessing"] == "assumed":
        missing.append("the pixel statistics of the training")
    missing.append("licence, consent and biases of the training pictures")
    return "\n".join(f"- {label}" for label in missing)


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _indented(text: str) -> str:
    """A code block that no content can end."""
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def _plain(value: Any) -> str:
    """Text that stays on its line and in its cell, and is no markup."""
    text = " ".join(str(value).split())
    return "".join({"|": "/", "<": "(", ">": ")", "`": "'"}.get(letter, letter) for letter in text)


def _code(value: Any) -> str:
    return f"`{_plain(value)}`"


def _or_unknown(value: Any) -> str:
    return UNKNOWN if value is None else _plain(value)


def _of(done: Any, planned: Any) -> str:
    """As in "20 of 100"; what is not known is said once."""
    known = done is not None or planned is not None
    return f"{_or_unknown(done)} of {_or_unknown(planned)}" if known else UNKNOWN


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


_FIGURES = ("knn_top1", "knn_top1_initial", "images_per_second", "seconds", "peak_memory_bytes")
_PLACES = ("shards", "probe_train", "probe_val", "cache_dir", "out")  # keys that hold locations
_MAX_DEPTH = 12


def pretraining(source: Source) -> dict[str, Any]:
    """What is known about the training.

    Args:
        source: A checkpoint of ours says most; converted weights hand on what their card says; of
            foreign ones no more than `epoch` and `arch` is taken, where they are there.

    Returns:
        Plain JSON: always the keys of `_NOTHING`; None where it is not known.
    """
    if source.card is not None and isinstance(source.card.get("pretraining"), Mapping):
        return _handed_on(plain(source.card["pretraining"]))
    if source.layout != "ours":
        stated = {key: source.contents.get(key) for key in ("epoch", "arch")}
        kinds = {"epoch": int, "arch": str}
        return _NOTHING | {
            f"stated_{key}": value for key, value in stated.items() if type(value) is kinds[key]
        }
    return _NOTHING | _from_our_checkpoint(source.contents) | _from_run_folder(source)


_NOTHING: dict[str, Any] = {
    "step": None, "num_steps": None, "epoch": None, "data": None, "method": None, "config": None,
    "config_sha256": None, "versions": None, "commit": None, "device": None, "figures": None,
    "remarks": [],
}  # fmt: skip


def _handed_on(known: dict[str, Any]) -> dict[str, Any]:
    """What an earlier card said; entries of another kind than `pretraining` writes are left out."""
    tables = ("data", "method", "config", "versions", "figures")
    kept = {key: known.get(key) for key in _NOTHING}
    kept |= {key: value for key, value in known.items() if key.startswith("stated_")}
    kept |= {key: kept[key] if isinstance(kept[key], dict) else None for key in tables}
    kept["remarks"] = [text for text in _list(known.get("remarks")) if isinstance(text, str)]
    if kept["figures"]:
        kept["figures"] = {key: _number(value) for key, value in kept["figures"].items()}
    if kept["data"]:
        shards = [x for x in _list(kept["data"].get("shards"))
                  if isinstance(x, dict) and {"place", "weight"} <= x.keys()]  # fmt: skip
        kept["data"] = kept["data"] | {"shards": shards}
    return kept


def _from_our_checkpoint(contents: Mapping[str, Any]) -> dict[str, Any]:
    config = _mapping(contents.get("config"))
    schedule, position = _mapping(contents.get("schedule")), _mapping(contents.get("position"))
    data = _mapping(config.get("data"))
    known = plain(without_places(config)) if config else None
    return {
        "step": _number(contents.get("step")),
        "num_steps": _number(schedule.get("num_steps")),
        "epoch": _number(position.get("epoch")),
        "data": {
            "shards": _shards(data.get("shards")),
            "fingerprint": plain(schedule.get("data_fingerprint")),
            "num_samples": None,
        },
        "method": _method(config) if config else None,
        "config": known,
        "config_sha256": _hash(known) if config else None,
        "versions": plain(_mapping(contents.get("versions"))) or None,
    }


def _method(config: Mapping[str, Any]) -> dict[str, Any]:
    """What was trained, in the config's own words."""
    data, fa = _mapping(config.get("data")), _mapping(config.get("fa"))
    return {
        "objective": plain(_mapping(config.get("objective")).get("name")),
        "feature_augmentation": plain(fa.get("method")),
        "architecture": plain(fa.get("architecture")),
        "augmentation": plain(data.get("augmentation")),
        "image_size": plain(data.get("image_size")),
        "batch_size": plain(data.get("batch_size")),
        "epochs": plain(_mapping(config.get("optim")).get("epochs")),
    }


def _from_run_folder(source: Source) -> dict[str, Any]:
    """Commit and device from environment.json, figures from summary.json, where they fit."""
    folder = source.path.parent
    folder = folder.parent if folder.name == "checkpoints" else folder
    environment = _json(folder / "environment.json")
    summary = _json(folder / "summary.json")
    found: dict[str, Any] = {
        "commit": plain(environment.get("commit")),
        "device": plain(environment.get("device")),
    }
    step = _number(source.contents.get("step"))
    if not summary:
        found["remarks"] = ["no summary.json stands beside the checkpoint: no figures"]
    elif step is None or summary.get("steps") != step:
        found["remarks"] = [
            f"summary.json is of step {summary.get('steps')!r:.20}, the checkpoint of {step}: its "
            "figures are left out"
        ]
    else:
        found["figures"] = {key: _number(summary.get(key)) for key in _FIGURES}
        found["data"] = {
            **_from_our_checkpoint(source.contents)["data"],
            "num_samples": _number(summary.get("num_samples")),
        }
    return found


def _shards(value: Any) -> list[dict[str, Any]] | None:
    """data.shards in its three spellings: [{"place", "weight"}]."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple):
        value = dict.fromkeys(map(str, value), 1.0)
    if not isinstance(value, Mapping):
        return None
    return [{"place": place(str(key)), "weight": plain(weight)} for key, weight in value.items()]


def place(location: str) -> str:
    """A location as a card may show it: it names the data, not a machine or an account.

    Of an absolute path the last two parts stay; a URL loses user, password and query (where
    signatures stand); of a `pipe:` command only its program stays.
    """
    if location.startswith("pipe:"):
        words = location.removeprefix("pipe:").split()
        return f"pipe:{words[0] if words else ''} .."
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", location):
        parts = urlsplit(location)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    path = Path(location)
    return "/".join(path.parts[-2:]).lstrip("/") if path.is_absolute() else location


def without_places(value: Any, key: str = "") -> Any:
    """A config in which every location is shortened by `place`."""
    if isinstance(value, Mapping):
        return {
            place(str(name)) if key == "shards" else name: without_places(item, str(name))
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_places(item, key) for item in value]
    return place(value) if isinstance(value, str) and key in _PLACES else value


def plain(value: Any, depth: int = 0) -> Any:
    """A value as strict JSON knows it: numbers that are none become text, objects their type."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if depth < _MAX_DEPTH and isinstance(value, Mapping):
        return {str(key): plain(item, depth + 1) for key, item in value.items()}
    if depth < _MAX_DEPTH and isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    return f"<{type(value).__name__}>"


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: Any) -> int | float | None:
    """A finite number; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _json(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty where there is no readable one."""
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}


FORMATS = {"detectron2": D2_CARD, "torchvision": TORCHVISION_CARD}


def build(
    source: Source, out: Path, to: str, stages: dict[str, float], seconds: float
) -> dict[str, Any]:
    """The card as plain JSON; docs/architecture.md lists its keys.

    Args:
        source: What was converted.
        out: The file written.
        to: "detectron2" or "torchvision".
        stages: Relative difference of each stage on the picture.
        seconds: Duration of the conversion.
    """
    num_norms = sum(name.endswith("running_var") for name in source.tensors)
    return {
        "format": FORMATS[to],
        "arch": asdict(source.arch),
        "preprocessing": _preprocessing(source, to),
        "branch": plain(source.card["branch"]) if source.card else source.branch,
        "source": {
            "file": source.path.name,
            "sha256": sha256_of(source.path),
            "layout": source.layout,
        },
        "made_from": plain(source.card["source"]) if source.card else None,
        "weights_file": out.name,
        "weights_sha256": sha256_of(out),
        "num_tensors": len(source.tensors),
        "num_norms": num_norms,
        "num_counters": len(source.counters),
        "cast_to_float32": source.cast,
        "dropped": sorted(source.dropped),
        "dropped_because": dict(sorted(Counter(source.dropped.values()).items())),
        "dropped_earlier": _dropped_earlier(source.card),
        "origins": source.origins,
        "notes": list(source.notes),
        "stages": stages,
        "max_relative_difference": max(stages.values()),
        "pretraining": pretraining(source),
        "converter": {"commit": provenance.commit(), "versions": provenance.versions()},
        "seconds": seconds,
    }


def _dropped_earlier(card: dict[str, Any] | None) -> dict[str, int]:
    """What earlier conversions left out, by reason."""
    found: dict[str, int] = {}
    for key in ("dropped_because", "dropped_earlier"):
        reasons = (card or {}).get(key)
        for reason, number in reasons.items() if isinstance(reasons, dict) else ():
            found[str(reason)] = found.get(str(reason), 0) + (number if type(number) is int else 0)
    return found


def _preprocessing(source: Source, to: str) -> dict[str, Any]:
    """Pixel statistics in the words of the library that will read them."""
    if to == "detectron2":
        return source.preprocessing.for_detectron2()
    mean, std = list(source.preprocessing.mean), list(source.preprocessing.std)
    return {"mean": mean, "std": std, "order": "RGB", "pixel_range": [0, 1]}


def paths(out: Path) -> tuple[Path, Path]:
    """backbone.pkl -> backbone.json, backbone.md."""
    return out.with_suffix(".json"), out.with_suffix(".md")


def check_places(out: Path) -> None:
    """Refuse to write a card over something that is none.

    Raises:
        UserError: If OUT.json or OUT.md exists and is no card.
    """
    card, text = paths(out)
    if card.exists() and read_any_card(card) is None:
        raise UserError(f"{out}: {card.name} exists and is no card; choose another name")
    if text.exists() and not _starts_like_card(text):
        raise UserError(f"{out}: {text.name} exists and is no card; choose another name")


def _starts_like_card(text: Path) -> bool:
    if not text.is_file():
        return False
    with open(text, "rb") as file:
        return file.read(len(MARK)) == MARK.encode()


def write(out: Path, card: dict[str, Any]) -> None:
    """Write both cards beside a weight file, each by rename."""
    place, text = paths(out)
    write_text(text, render(card))
    write_json(place, card)
