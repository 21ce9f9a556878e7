"""The cards that travel with weights: OUT.json for programs, OUT.md for people.

Both hold the same facts: what the network expects of its pixels, where it comes from, how its
training is described, what was left out, how the conversion was proved.
"""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import provenance
from common.errors import UserError
from common.files import sha256_of, write_json, write_text
from detection.convert import card_text as model_card_text
from detection.convert.conventions import D2_CARD, TORCHVISION_CARD, read_any_card
from detection.convert.source import Source
from detection.convert.training_record import plain, pretraining

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
        return file.read(len(model_card_text.MARK)) == model_card_text.MARK.encode()


def write(out: Path, card: dict[str, Any]) -> None:
    """Write both cards beside a weight file, each by rename."""
    place, text = paths(out)
    write_text(text, model_card_text.render(card))
    write_json(place, card)
