"""The model card as markdown, made from the JSON card alone: what is not known is said."""

from collections.abc import Mapping
from typing import Any

import yaml

from common.resnet import Arch, read_arch

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
            "`detection.convert.reference_resnet.ReferenceResNet` builds it:\n\n"
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
