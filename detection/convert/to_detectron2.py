"""Weights from one layout to another, proved on a picture: to Detectron2, or back to torchvision.

Read, name and check (`common.backbone`), build the reference ResNet and Detectron2's from the same
tensors, compare res2 to res5 on one picture, write, read back, compare every tensor bit by bit.
Nothing is written unless the comparison held. Two cards travel with the weights: OUT.json for
programs (docs/files.md lists the keys), OUT.md with its main facts for people.
"""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from common import provenance
from common.backbone import (
    D2_CARD,
    TORCHVISION_CARD,
    BackboneCheckpoint,
    ReferenceResNet,
    read_any_card,
    read_backbone,
)
from common.errors import UserError
from common.files import (
    is_number,
    read_json_or_none,
    sha256_of,
    write_atomically,
    write_json,
    write_text,
)
from common.resnet import COUNTER, detectron2_name
from detection.convert import parity
from detection.training import weights

_ENDINGS = {"detectron2": (".pkl", ".pth"), "torchvision": (".pth", ".pt")}
MARK = "<!-- model card of feature-augmented pretraining -->"
_TRAINING = ("step", "num_steps", "epoch", "data_fingerprint", "config", "versions", "commit",
             "device", "figures")  # fmt: skip
_FIGURES = ("knn_top1", "knn_top1_initial", "num_samples", "images_per_second", "seconds",
            "peak_memory_bytes")  # fmt: skip
_PLACES = ("shards", "probe_train", "probe_val", "cache_dir", "out")  # keys that hold locations
_MAX_DEPTH = 12
_SHOWN = ("arch", "weights_sha256", "source", "branch", "preprocessing", "origins",
          "max_relative_difference", "dropped_because", "notes")  # fmt: skip


def to_torchvision(source: BackboneCheckpoint) -> dict[str, Tensor]:
    """A state_dict with torchvision's names in torchvision's order, batch counters in place."""
    state = {}
    for name, value in source.tensors.items():
        state[name] = value
        counter = f"{name.removesuffix('running_var')}{COUNTER}"
        if name.endswith("running_var") and counter in source.counters:
            state[counter] = source.counters[counter]
    return state


def convert(
    source: BackboneCheckpoint,
    out: Path,
    *,
    to: str = "detectron2",
    size: int = 224,
) -> dict[str, Any]:
    """Convert, compare, write, read back, write the cards.

    Args:
        source: From `read_backbone`.
        out: File ending in .pkl or .pth (to Detectron2), .pth or .pt (to torchvision); the cards
            are written beside it as .json and .md.
        to: "detectron2" or "torchvision".
        size: Side of the picture in pixels.

    Returns:
        The card.

    Raises:
        UserError: If `out` has another ending or would overwrite what it must not, the network is
            none that both libraries build, or the features differ by more than
            parity.TOLERANCE; then nothing is written.
    """
    _check_out(source, out, to)
    began = time.perf_counter()
    image = source.preprocessing.normalise(parity.comparison_picture(size))
    state = parity.to_detectron2(source.tensors)
    stages = parity.compare(
        parity.features(ReferenceResNet(source.arch), source.tensors, image),
        parity.features(parity.build_bare_resnet(source.arch), state, image),
    )
    if not max(stages.values()) <= parity.TOLERANCE:
        listed = ", ".join(f"{stage} {value:.1e}" for stage, value in stages.items())
        raise UserError(
            f"{source.path}: Detectron2's features differ from the reference ({listed}; allowed "
            f"{parity.TOLERANCE:.0e}); nothing was written. The weights were trained with "
            "another architecture or stride convention than the names say"
        )
    try:
        if to == "detectron2":
            counters = {
                detectron2_name(name): int(value) for name, value in source.counters.items()
            }
            weights.write_weights(out, state, counters)
            detector = nn.Module()  # just enough of one to load the file as training does
            detector.backbone = parity.build_bare_resnet(source.arch)
            weights.load_backbone(detector, out)
            loaded = detector.backbone.state_dict()
            assert all(torch.equal(loaded[name], value) for name, value in state.items())
        else:
            write_atomically(out, lambda file: torch.save(to_torchvision(source), file))
        # Read as a file of another project is read; every bit must be there.
        written = read_backbone(out, layout=to, assume=True)
        changed = [name for name, value in source.tensors.items()
                   if not parity.same_bits(value, written.tensors[name])]  # fmt: skip
        changed += [name for name, value in source.counters.items()
                    if not torch.equal(value, written.counters.get(name, value + 1))]  # fmt: skip
        if changed or written.arch != source.arch:
            raise UserError(f"{out}: {[*changed, 'arch'][0]} changed on the way through the file")
    except UserError:
        out.unlink(missing_ok=True)
        raise
    card = build_card(source, out, to, stages, time.perf_counter() - began)
    write_text(out.with_suffix(".md"), render(card))
    write_json(out.with_suffix(".json"), card)
    return card


def _check_out(source: BackboneCheckpoint, out: Path, to: str) -> None:
    """Refuse a name that says something else, and one that would destroy something."""
    endings = _ENDINGS[to]
    if out.suffix not in endings:
        raise UserError(f"{out}: end the name in {' or '.join(endings)}")
    if out.resolve() == source.path.resolve():
        raise UserError(f"{out}: is the checkpoint itself; choose another name")
    card, text = out.with_suffix(".json"), out.with_suffix(".md")
    is_text = text.is_file() and text.read_bytes()[: len(MARK)] == MARK.encode()
    is_card = (read_any_card(card) or {}).get("weights_file") == out.name
    for place, is_own in ((card, is_card), (text, is_text)):
        if place.exists() and not is_own:
            raise UserError(f"{out}: {place.name} exists and is no card of it; choose another name")


# -- cards -----------------------------------------------------------------------------------------


def build_card(
    source: BackboneCheckpoint, out: Path, to: str, stages: dict[str, float], seconds: float
) -> dict[str, Any]:
    """The card as plain JSON: what the network expects of its pixels, where it comes from.

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
    """The main facts of a card from `build_card` as about ten lines of markdown."""
    known = card["pretraining"]
    config = _mapping(known["config"])
    facts = {key: card[key] for key in _SHOWN}
    facts |= {key: known[key] for key in ("step", "num_steps", "epoch", "commit", "figures")}
    facts |= {key: config.get(key) for key in ("objective", "fa")}
    lines = [f"- {key}: {_text(value)}" for key, value in facts.items() if value]
    return "\n".join([MARK, f"# Model card: {_text(card['weights_file'])}", "", *lines, ""])


def _text(value: Any) -> str:
    """Text that stays on its line and is no markup."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join(text.split()).translate(str.maketrans("<>`", "()'"))


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
