"""What is known about how weights were trained: read off the checkpoint and the files beside it.

Nothing is guessed: what is not written there is None, and the card says "not known".
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from detection.convert.source import Source

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
