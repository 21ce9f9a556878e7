#!/usr/bin/env python3
"""Measure the conversion: torchvision's own ResNets against Detectron2's, there and back.

For each network: random weights with lively norms and counters, torchvision -> Detectron2 ->
torchvision. Reported are the largest difference of res2 to res5 between torchvision's own forward
and Detectron2's network, loaded as training loads it, relative to the largest value, and whether
the state_dict came back bit by bit.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torchvision
from torch import Tensor, nn

from common.errors import UserError
from common.files import write_json
from detection.arch import Arch
from detection.convert import convert, read_source
from detection.parity import build_bare_resnet, comparison_picture
from detection.pixels import IMAGENET
from detection.reference_resnet import STAGES, ReferenceResNet
from detection.weights import load_backbone

NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2", "thin_resnet50")
THIN = Arch(50, 16, 16, 64)
_EXAMPLE = """\
example: .venv/bin/python benchmarks/conversion_parity.py --json conversion.json

Exit status: 0 all networks came back and agree within 1e-5, 1 one does not, 2 wrong arguments."""


def build(name: str, seed: int) -> nn.Module:
    """A network with random weights, norms and batch counters."""
    torch.manual_seed(seed)
    network = ReferenceResNet(THIN) if name == "thin_resnet50" else getattr(
        torchvision.models, name
    )()  # fmt: skip
    for number, module in enumerate(network.modules()):
        if isinstance(module, nn.BatchNorm2d):
            shape = module.weight.shape
            module.weight.data = 0.5 + torch.rand(shape)
            module.bias.data = 0.2 * torch.randn(shape)
            module.running_mean = 0.2 * torch.randn(shape)
            module.running_var = 0.5 + torch.rand(shape)
            module.num_batches_tracked = torch.tensor(1000 + number)
    return network.eval()


@torch.no_grad()
def own_features(network: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Features of layer1 to layer4 in a network's own forward."""
    found: dict[str, Tensor] = {}

    def keep(stage: str) -> Any:
        return lambda _module, _inputs, output: found.__setitem__(stage, output)

    hooks = [network.get_submodule(f"layer{number}").register_forward_hook(keep(stage))
             for number, stage in enumerate(STAGES, start=1)]  # fmt: skip
    network(image)
    for hook in hooks:
        hook.remove()
    return found


def measure(name: str, seed: int, size: int, folder: Path) -> dict[str, Any]:
    """One network there and back."""
    network = build(name, seed)
    given = {key: value for key, value in network.state_dict().items() if "fc." not in key}
    torch.save(network.state_dict(), folder / "from.pth")
    began = time.process_time()
    source = read_source(folder / "from.pth")
    convert(source, folder / "there.pkl", size=size)
    there = time.process_time() - began
    began = time.process_time()
    convert(read_source(folder / "there.pkl"), folder / "back.pth", to="torchvision", size=size)
    back = time.process_time() - began
    returned = torch.load(folder / "back.pth", weights_only=True)
    holder = nn.Module()
    holder.backbone = build_bare_resnet(source.arch)
    load_backbone(holder, folder / "there.pkl")
    image = IMAGENET.normalise(comparison_picture(None, size))
    expected = own_features(network, image)
    with torch.no_grad():
        found = holder.backbone.eval()(image)
    stages = {
        stage: ((found[stage] - expected[stage]).abs().max() / expected[stage].abs().max()).item()
        for stage in STAGES
    }
    return {
        "network": name,
        "num_tensors": len(source.tensors),
        "num_counters": len(source.counters),
        "stages": stages,
        "max_relative_difference": max(stages.values()),
        "bit_equal": list(returned) == list(given)
        and all(same_bytes(returned[key], value) for key, value in given.items()),
        "cpu_seconds_to_detectron2": there,
        "cpu_seconds_to_torchvision": back,
    }


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    return first.dtype == second.dtype and first.numpy().tobytes() == second.numpy().tobytes()


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="which (all)")
    add("--size", type=int, default=224, help="side of the picture in pixels (224)")
    add("--seed", type=int, default=0, help="of the weights (0)")
    add("--json", type=Path, metavar="OUT", help="write the figures here")
    arguments = parser.parse_args(argv)
    if arguments.size < 64:
        print(f"error: --size {arguments.size}: give at least 64", file=sys.stderr)
        return 2
    rows = []
    try:
        for name in arguments.networks:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(name, arguments.seed, arguments.size, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    is_good = all(row["bit_equal"] and row["max_relative_difference"] <= 1e-5 for row in rows)
    if arguments.json is not None:
        versions = {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}
        result = {"size": arguments.size, "seed": arguments.seed, "versions": versions}
        write_json(arguments.json, {**result, "networks": rows, "good": is_good})
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
