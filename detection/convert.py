"""Weights from one layout to another, proved on a picture: to Detectron2, or back to torchvision.

Read, name and check (`common.backbone`), build the reference ResNet and Detectron2's from the same
tensors, compare res2 to res5 on one picture, write, read back, compare every tensor bit by bit.
Nothing is written unless the comparison held. Two cards travel with the weights: OUT.json for
programs (docs/files.md lists the keys), OUT.md with its main facts for people.
"""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import ResNet as Detectron2ResNet
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from torch import Tensor, nn

from common import backbone, checkpoints, files, provenance
from common.errors import UserError, require
from common.network import ResNet, shapes_alone
from common.resnet import COUNTER, D2_CARD, TORCHVISION_CARD, Arch, detectron2_name
from detection.training import weights
from detection.training.config import set_arch

STAGES = ("res2", "res3", "res4", "res5")
TOLERANCE = 1e-5
_STATED = ("checkpoint", "card", "config")


def build_bare_resnet(arch: Arch) -> Detectron2ResNet:
    """Detectron2's ResNet with all four stages as outputs (a C4 detector's own stops at res4).

    Raises:
        UserError: If Detectron2 builds no ResNet of these widths.
    """
    if not arch.is_bottleneck and (arch.res2_channels, arch.stem_channels) != (64, 64):
        raise UserError(f"{arch}: Detectron2 builds ResNet-18/34 with 64 channels only")
    cfg = get_cfg()
    set_arch(cfg, arch)
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = list(STAGES)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


def comparison_picture(size: int) -> Tensor:
    """The picture that features are compared on: edges, gradients and texture.

    Args:
        size: Side in pixels.

    Returns:
        uint8 RGB (size, size, 3).
    """
    generator = np.random.default_rng(20)
    y, x = np.mgrid[0:size, 0:size] / size
    smooth = np.stack([x, y, 0.5 + 0.5 * np.sin(20 * x * y)], axis=-1)
    disc = ((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.06)[..., None] * np.array([0.7, -0.4, 0.3])
    noise = generator.normal(0, 0.08, (size, size, 3))
    return torch.from_numpy((255 * np.clip(smooth + disc + noise, 0, 1)).astype(np.uint8))


def to_detectron2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision-named tensors under Detectron2's names, in a fixed order."""
    return dict(sorted((detectron2_name(name), value) for name, value in tensors.items()))


@torch.no_grad()
def features(
    build: Callable[[Arch], nn.Module], arch: Arch, state: dict[str, Tensor], image: Tensor
) -> dict[str, Tensor]:
    """Features res2 to res5 in fp32 and evaluation mode; every tensor must find its place.

    Args:
        build: `ResNet`, or `build_bare_resnet` for Detectron2's.
        arch: Its architecture.
        state: Its tensors, batch counters left out.
        image: Normalised pictures (N, 3, H, W), float32.
    """
    with shapes_alone():
        network = build(arch)
    result = network.load_state_dict(state, strict=False, assign=True)
    left = [key for key in result.missing_keys if not key.endswith("num_batches_tracked")]
    assert not left, f"missing {left}"
    assert not result.unexpected_keys, f"unexpected {result.unexpected_keys}"
    network.eval()
    return network.stages(image) if isinstance(network, ResNet) else network(image)


def compare(reference: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Compare the features of two networks, stage by stage.

    Returns:
        {"res2": `relative_difference`, ..}; infinity where the reference's stage is dead, since
        that proves nothing.
    """
    return {
        stage: relative_difference(reference[stage], other[stage])
        if reference[stage].any()
        else float("inf")
        for stage in STAGES
    }


def relative_difference(first: Tensor, second: Tensor) -> float:
    """max|a - b| / max(|a|, |b|); 0 where both are 0, infinity where it is no number."""
    if first.shape != second.shape:
        return float("inf")
    if torch.equal(first, second):
        return 0.0
    scale = torch.maximum(first.abs().max(), second.abs().max()).double()
    difference = ((first.double() - second.double()).abs().max() / scale).item()
    return difference if np.isfinite(difference) else float("inf")


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two float32 tensors agree bit by bit; -0.0 and 0.0 do not."""
    return first.shape == second.shape and torch.equal(
        first.view(torch.int32), second.view(torch.int32)
    )


def verify(
    first: Path,
    second: Path,
    *,
    layouts: tuple[str, str] = ("auto", "auto"),
    branches: tuple[str, str] = ("online", "online"),
    size: int = 224,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Compare the weights of two files of any two layouts.

    Args:
        first: File A.
        second: File B.
        layouts: Of A and B; see common.resnet.LAYOUTS, or "auto".
        branches: Of A and B.
        size: Side of the picture in pixels; it is normalised as A says, or B.
        tolerance: Largest relative difference of a tensor or a stage that counts as the same.

    Returns:
        Plain JSON: "same" is the verdict, "reasons" says why not, "a" and "b" what was read,
        "tensors" and "stages" the relative differences (None: no number), "preprocessing" whether
        the pixels agree. A file that is no complete ResNet makes "refused" the reason.

    Raises:
        UserError: If a file is missing.
    """
    report: dict[str, Any] = {"same": False, "refused": None, "tolerance": tolerance}
    sources: list[backbone.BackboneCheckpoint] = []
    for name, path, layout, branch in zip("ab", (first, second), layouts, branches, strict=True):
        require(path.is_file(), f"{path}: no such checkpoint")
        try:
            source = backbone.read_backbone(path, layout=layout, branch=branch, assume=True)
        except UserError as error:
            return report | {"refused": str(error), "reasons": [str(error)]}
        sources.append(source)
        report[name] = {
            "file": str(source.path),
            "sha256": files.sha256_of(source.path),
            "layout": source.layout,
            "branch": source.branch,
            "arch": asdict(source.arch),
            "origins": source.origins,
            "notes": list(source.notes),
        }
    a, b = sources
    if a.arch != b.arch:
        reason = f"another architecture: {first} is a {a.arch}, {second} a {b.arch}"
        return report | {"refused": reason, "reasons": [reason]}

    # Tensors, and the features that each file's own library computes from them.
    stated = [s.preprocessing for s in sources if s.origins["preprocessing"] in _STATED]
    pixels = stated[0] if stated else a.preprocessing
    image = pixels.normalise(comparison_picture(size).permute(2, 0, 1)[None])
    computed = [
        features(build_bare_resnet, s.arch, to_detectron2(s.tensors), image)
        if s.layout == "detectron2"
        else features(ResNet, s.arch, s.tensors, image)
        for s in sources
    ]
    stages = compare(*computed)
    tensors = {
        name: {"same_bits": same_bits(value, b.tensors[name]),
               "relative_difference": relative_difference(value, b.tensors[name])}
        for name, value in a.tensors.items()
    }  # fmt: skip
    agreement = "not stated"
    if len(stated) == 2:
        pairs = zip(*((*pixels.mean, *pixels.std) for pixels in stated), strict=True)
        agreement = "same" if all(abs(x - y) < 1e-6 for x, y in pairs) else "different"

    # Why they are not the same. Batch counters do not decide, since evaluation does not use them.
    reasons = []
    off = [name for name, row in tensors.items() if row["relative_difference"] > tolerance]
    if off:
        reasons.append(f"{len(off)} of {len(tensors)} tensors differ, first {off[0]}")
    off = [stage for stage, value in stages.items() if value > tolerance]
    if off:
        reasons.append(f"the features differ from {off[0]} on ({', '.join(off)})")
    if agreement == "different":
        reasons.append("the files state different pixel statistics")
    report |= {"tensors": tensors, "stages": stages}
    return files.finite(
        report | {"preprocessing": agreement, "reasons": reasons, "same": not reasons}
    )


def text(report: dict[str, Any]) -> str:
    """The report for a person; every tensor stands in the JSON only."""
    lines = []
    for name in "ab":
        if name in report:
            facts = report[name]
            about = "; ".join([facts["layout"], facts["branch"], *facts["notes"]])
            lines.append(f"{name.upper()}  {facts['file']}  {Arch(**facts['arch'])}; {about}")
    if report["refused"] is None:
        num_same = sum(row["same_bits"] for row in report["tensors"].values())
        lines += [
            f"tensors: {num_same} of {len(report['tensors'])} equal bit by bit",
            f"features on the picture, relative difference: {report['stages']}",
            f"pixel statistics: {report['preprocessing']}",
        ]
    if report["same"]:
        return "\n".join([*lines, "the same network"])
    return "\n".join([*lines, *(f"not the same: {reason}" for reason in report["reasons"])])


_ENDINGS = {
    "detectron2": (".pkl", ".pth"),
    "torchvision": (".pth", ".pt"),
    "timm": (".pth", ".pt"),
    "safetensors": (".safetensors",),
}
MARK = "<!-- model card of feature-augmented pretraining -->"
_TRAINING = ("step", "num_steps", "epoch", "data_fingerprint", "config", "versions", "commit",
             "device", "figures")  # fmt: skip
_FIGURES = ("knn_top1", "knn_top1_initial", "num_samples", "images_per_second", "seconds",
            "peak_memory_bytes")  # fmt: skip
_PLACES = ("shards", "probe_train", "probe_val", "cache_dir", "out")  # keys that hold locations
_MAX_DEPTH = 12
_SHOWN = ("arch", "weights_sha256", "source", "branch", "preprocessing", "origins",
          "max_relative_difference", "dropped_because", "notes")  # fmt: skip


def to_torchvision(source: backbone.BackboneCheckpoint) -> dict[str, Tensor]:
    """A state_dict with torchvision's names in torchvision's order, batch counters in place."""
    state = {}
    for name, value in source.tensors.items():
        state[name] = value
        counter = f"{name.removesuffix('running_var')}{COUNTER}"
        if name.endswith("running_var") and counter in source.counters:
            state[counter] = source.counters[counter]
    return state


def convert(
    source: backbone.BackboneCheckpoint, out: Path, *, to: str = "detectron2", size: int = 224
) -> dict[str, Any]:
    """Convert, compare, write, read back, write the cards.

    Args:
        source: From `read_backbone`.
        out: File ending as _ENDINGS says; the cards are written beside it as .json and .md.
        to: "detectron2", "torchvision", "timm" (which has the same names), or "safetensors" (in
            torchvision's names).
        size: Side of the picture in pixels.

    Returns:
        The card.

    Raises:
        UserError: If `out` has another ending or would overwrite what it must not, the network is
            none that both libraries build, or the features differ by more than
            TOLERANCE; then nothing is written.
    """
    _check_out(source, out, to)
    began = time.perf_counter()
    image = source.preprocessing.normalise(comparison_picture(size).permute(2, 0, 1)[None])
    state = to_detectron2(source.tensors)
    stages = compare(
        features(ResNet, source.arch, source.tensors, image),
        features(build_bare_resnet, source.arch, state, image),
    )
    if not max(stages.values()) <= TOLERANCE:
        listed = ", ".join(f"{stage} {value:.1e}" for stage, value in stages.items())
        raise UserError(
            f"{source.path}: Detectron2's features differ from the reference ({listed}; allowed "
            f"{TOLERANCE:.0e}); nothing was written. The weights were trained with "
            "another architecture or stride convention than the names say"
        )
    try:
        if to == "detectron2":
            counters = {
                detectron2_name(name): int(value) for name, value in source.counters.items()
            }
            weights.write_weights(out, state, counters)
            detector = nn.Module()  # just enough of one to load the file as training does
            detector.backbone = build_bare_resnet(source.arch)
            weights.load_backbone(detector, out)
            loaded = detector.backbone.state_dict()
            assert all(torch.equal(loaded[name], value) for name, value in state.items())
        elif to == "safetensors":
            files.write_bytes(out, checkpoints.dump_safetensors(to_torchvision(source)))
        else:
            files.write_atomically(out, lambda file: torch.save(to_torchvision(source), file))
        # Read as a file of another project is read; every bit must be there.
        layout = "torchvision" if to == "safetensors" else to
        written = backbone.read_backbone(out, layout=layout, assume=True)
        changed = [name for name, value in source.tensors.items()
                   if not same_bits(value, written.tensors[name])]  # fmt: skip
        changed += [name for name, value in source.counters.items()
                    if not torch.equal(value, written.counters.get(name, value + 1))]  # fmt: skip
        if changed or written.arch != source.arch:
            raise UserError(f"{out}: {[*changed, 'arch'][0]} changed on the way through the file")
    except UserError:
        out.unlink(missing_ok=True)
        raise
    card = build_card(source, out, to, stages, time.perf_counter() - began)
    files.write_text(out.with_suffix(".md"), render(card))
    files.write_json(out.with_suffix(".json"), card)
    return card


def _check_out(source: backbone.BackboneCheckpoint, out: Path, to: str) -> None:
    """Refuse a name that says something else, and one that would destroy something."""
    endings = _ENDINGS[to]
    require(out.suffix in endings, f"{out}: end the name in {' or '.join(endings)}")
    if out.resolve() == source.path.resolve():
        raise UserError(f"{out}: is the checkpoint itself; choose another name")
    card, text = out.with_suffix(".json"), out.with_suffix(".md")
    is_text = text.is_file() and text.read_bytes()[: len(MARK)] == MARK.encode()
    is_card = (backbone.read_any_card(card) or {}).get("weights_file") == out.name
    for place, is_own in ((card, is_card), (text, is_text)):
        if place.exists() and not is_own:
            raise UserError(f"{out}: {place.name} exists and is no card of it; choose another name")


# -- cards -----------------------------------------------------------------------------------------


def build_card(
    source: backbone.BackboneCheckpoint,
    out: Path,
    to: str,
    stages: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    """The card as plain JSON: what the network expects of its pixels, where it comes from.

    Args:
        source: What was converted.
        out: The file written.
        to: See `convert`.
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
            "sha256": files.sha256_of(source.path),
            "layout": source.layout,
        },
        "made_from": plain(source.card["source"]) if source.card else None,
        "weights_file": out.name,
        "weights_sha256": files.sha256_of(out),
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


def pretraining(source: backbone.BackboneCheckpoint) -> dict[str, Any]:
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
        environment = _mapping(files.read_json_or_none(folder / "environment.json"))
        summary = _mapping(files.read_json_or_none(folder / "summary.json"))
        schedule = _mapping(source.contents.get("schedule"))
        step = source.contents.get("step")
        if type(step) is int and summary.get("steps") == step:  # else they are another step's
            figures = {key: summary.get(key) for key in _FIGURES}
            known["figures"] = {
                key: value for key, value in figures.items() if files.is_number(value)
            }
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
        try:
            parts = urlsplit(location)
        except ValueError:  # as of brackets that do not close
            return f"{location.partition(':')[0]}://.."
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
