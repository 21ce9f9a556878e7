"""The cards that travel with weights: OUT.json for programs, OUT.md for people.

What the network expects of its pixels, where it comes from, how it was trained, what was left out,
how the conversion was proved. docs/files.md lists the keys.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common import provenance
from common.backbone import D2_CARD, TORCHVISION_CARD, BackboneCheckpoint, read_any_card
from common.errors import UserError
from common.files import is_number, read_json_or_none, sha256_of, write_json, write_text
from common.resnet import Arch

MARK = "<!-- model card of feature-augmented pretraining -->"
_TRAINING = ("step", "num_steps", "epoch", "data_fingerprint", "config", "versions", "commit",
             "device", "figures")  # fmt: skip
_FIGURES = ("knn_top1", "knn_top1_initial", "num_samples", "images_per_second", "seconds",
            "peak_memory_bytes")  # fmt: skip
_PLACES = ("shards", "probe_train", "probe_val", "cache_dir", "out")  # keys that hold locations
_MAX_DEPTH = 12


def build(
    source: BackboneCheckpoint, out: Path, to: str, stages: dict[str, float], seconds: float
) -> dict[str, Any]:
    """The card as plain JSON.

    Args:
        source: What was converted.
        out: The file written.
        to: "detectron2" or "torchvision".
        stages: Relative difference of each stage on the picture.
        seconds: Duration of the conversion.
    """
    mean, std = source.preprocessing.mean, source.preprocessing.std
    if to == "detectron2":  # which counts pixels from 0 to 255
        pixels = {
            "pixel_mean": [round(255 * value, 6) for value in mean],
            "pixel_std": [round(255 * value, 6) for value in std],
            "input_format": "RGB",
            "stride_in_1x1": False,
        }
    else:
        pixels = {"mean": list(mean), "std": list(std), "order": "RGB", "pixel_range": [0, 1]}
    return {
        "format": D2_CARD if to == "detectron2" else TORCHVISION_CARD,
        "arch": asdict(source.arch),
        "preprocessing": pixels,
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
        "num_norms": sum(name.endswith("running_var") for name in source.tensors),
        "num_counters": len(source.counters),
        "cast_to_float32": source.cast,
        "dropped": sorted(source.dropped),
        "dropped_because": dict(sorted(Counter(source.dropped.values()).items())),
        "origins": source.origins,
        "notes": list(source.notes),
        "stages": stages,
        "max_relative_difference": max(stages.values()),
        "pretraining": pretraining(source),
        "converter": {"commit": provenance.commit(), "versions": provenance.versions()},
        "seconds": seconds,
    }


def pretraining(source: BackboneCheckpoint) -> dict[str, Any]:
    """What is known about the training, as plain JSON.

    Args:
        source: A checkpoint of ours says most, with environment.json and summary.json of its run's
            folder; converted weights hand on what their card says; of other projects' checkpoints
            only the epoch is taken.

    Returns:
        The keys of _TRAINING; None where it is not known.
    """
    known: dict[str, Any] = {}
    if source.card is not None:
        known = plain(_mapping(source.card.get("pretraining")))
        for key in ("config", "versions", "figures"):
            known[key] = _mapping(known.get(key)) or None
    elif source.layout == "ours":
        folder = source.path.parent
        folder = folder.parent if folder.name == "checkpoints" else folder
        environment = _mapping(read_json_or_none(folder / "environment.json"))
        summary = _mapping(read_json_or_none(folder / "summary.json"))
        schedule = _mapping(source.contents.get("schedule"))
        step = source.contents.get("step")
        if step is not None and summary.get("steps") == step:  # else they are another step's
            figures = {key: summary.get(key) for key in _FIGURES}
            known["figures"] = {key: value for key, value in figures.items() if is_number(value)}
        known |= {
            "step": step,
            "num_steps": schedule.get("num_steps"),
            "epoch": _mapping(source.contents.get("position")).get("epoch"),
            "data_fingerprint": schedule.get("data_fingerprint"),
            "config": without_places(_mapping(source.contents.get("config"))) or None,
            "versions": _mapping(source.contents.get("versions")) or None,
            "commit": environment.get("commit"),
            "device": environment.get("device"),
        }
    elif type(source.contents.get("epoch")) is int:
        known["epoch"] = source.contents["epoch"]
    return {key: plain(known.get(key)) for key in _TRAINING}


def render(card: Mapping[str, Any]) -> str:
    """The card as about ten lines of markdown.

    Args:
        card: From `build`.
    """
    source, known, pixels = card["source"], card["pretraining"], card["preprocessing"]
    config, arch = _mapping(known["config"]), Arch(**card["arch"])
    fa, shards = _mapping(config.get("fa")), _mapping(config.get("data")).get("shards")
    training = {
        "objective": _mapping(config.get("objective")).get("name"),
        "feature augmentation": fa.get("method"),
        "architecture": fa.get("architecture"),
        "steps": known["step"],
        "of": known["num_steps"],
        "epochs": known["epoch"],
        "commit": known["commit"],
    }
    lines = {
        "Network": f"{arch} without classifier, {card['num_tensors']} tensors",
        "SHA-256": card["weights_sha256"],
        "Converted from": f"{source['file']} ({source['layout']}, {card['branch']}), SHA-256 "
        f"{source['sha256']}",
        "Pixels": _listed(pixels),
        "Pixels known from": card["origins"]["preprocessing"],
        "Training": _listed(training),
        "Training data": ", ".join(map(str, shards if isinstance(shards, Mapping | list) else ())),
        "Figures": _listed(_mapping(known["figures"])),
        "Proof": "Detectron2's features differ from the reference's by at most "
        f"{card['max_relative_difference']:.1e}, relative to the largest",
        "Left out": ", ".join(
            f"{count} keys: {reason}" for reason, count in card["dropped_because"].items()
        ),
        "Brought to float32": _listed(card["cast_to_float32"]) if card["cast_to_float32"] else "",
        "Notes": "; ".join(card["notes"]),
    }
    if "pixel_mean" in pixels:
        query = "?matching_heuristics=True" if card["weights_file"].endswith(".pth") else ""
        keys = {
            "WEIGHTS": f"{card['weights_file']}{query}",
            "PIXEL_MEAN": pixels["pixel_mean"],
            "PIXEL_STD": pixels["pixel_std"],
            "RESNETS.DEPTH": arch.depth,
            "RESNETS.WIDTH_PER_GROUP": arch.width_per_group,
            "RESNETS.STEM_OUT_CHANNELS": arch.stem_channels,
            "RESNETS.RES2_OUT_CHANNELS": arch.res2_channels,
            "RESNETS.STRIDE_IN_1X1": False,
        }
        pairs = (f"MODEL.{key} {str(value).replace(' ', '')}" for key, value in keys.items())
        lines["For Detectron2"] = " ".join([*pairs, "INPUT.FORMAT RGB"])
    items = [f"- {name}: {_text(value)}" for name, value in lines.items() if value]
    return "\n".join([MARK, f"# Model card: {_text(card['weights_file'])}", "", *items, ""])


def _listed(facts: Mapping[str, Any]) -> str:
    """As in "steps 20, of 100"; what is not known is left out."""
    known = {key: value for key, value in facts.items() if value is not None}
    return ", ".join(f"{key} {value}" for key, value in known.items()) or "not known"


def check_places(out: Path) -> None:
    """Refuse to write a card over something that is none.

    Raises:
        UserError: If OUT.json or OUT.md exists and is no card.
    """
    card, text = out.with_suffix(".json"), out.with_suffix(".md")
    is_text = text.is_file() and text.read_bytes()[: len(MARK)] == MARK.encode()
    for place, is_card in ((card, read_any_card(card) is not None), (text, is_text)):
        if place.exists() and not is_card:
            raise UserError(f"{out}: {place.name} exists and is no card; choose another name")


def write(out: Path, card: dict[str, Any]) -> None:
    """Write both cards beside a weight file, each by rename."""
    write_text(out.with_suffix(".md"), render(card))
    write_json(out.with_suffix(".json"), card)


def place(location: str) -> str:
    """A location as a card may show it: it names the data, not a machine or an account.

    Of an absolute path the last two parts stay; a URL loses user, password and query (where
    signatures stand); of a `pipe:` command only its program stays.
    """
    if location.startswith("pipe:"):
        program = location.removeprefix("pipe:").partition(" ")[0]
        return f"pipe:{program} .."
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


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    """Text that stays on its line and is no markup."""
    return " ".join(str(value).split()).translate(str.maketrans("<>`", "()'"))
