"""ResNets: blocks of each depth, the four numbers of a checkpoint's `arch`, shapes of tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import UserError

BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
MAX_CHANNELS = 16384  # what a damaged `arch` may ask for


@dataclass(frozen=True)
class Arch:
    """Depth and channels: a torchvision ResNet-50 is (50, 64, 64, 256), ResNet-18 (18, 64, 64, 64),
    the thin one (50, 16, 16, 64).

    `width_per_group` is the width inside the first stage's bottleneck, `stem_channels` and
    `res2_channels` are output channels.
    """

    depth: int = 50
    width_per_group: int = 64
    stem_channels: int = 64
    res2_channels: int = 256

    @property
    def is_bottleneck(self) -> bool:
        """Whether its blocks have three convolutions."""
        return self.depth >= 50

    @property
    def blocks_per_stage(self) -> tuple[int, int, int, int]:
        """Blocks of res2 to res5."""
        return BLOCKS_PER_STAGE[self.depth]

    def __str__(self) -> str:
        return (
            f"ResNet-{self.depth} (width {self.width_per_group}, stem {self.stem_channels}, "
            f"res2 {self.res2_channels})"
        )


NAMED = {
    "R18": Arch(18, 64, 64, 64),
    "R34": Arch(34, 64, 64, 64),
    "R50": Arch(50, 64, 64, 256),
    "R101": Arch(101, 64, 64, 256),
    "thin_R50": Arch(50, 16, 16, 64),
}


def read_arch(value: Any) -> Arch:
    """Check the `arch` of a checkpoint or a card; without a name it is a ResNet's.

    Raises:
        UserError: If it is another backbone's, not four whole numbers, or of no known depth.
    """
    if isinstance(value, Mapping) and "name" in value:
        if value["name"] != "resnet":
            raise UserError(
                f"arch.name is {value['name']!r}: only a ResNet's checkpoint can be read here"
            )
        value = {key: number for key, number in value.items() if key != "name"}
    fields = Arch.__dataclass_fields__
    if not isinstance(value, Mapping) or set(value) != set(fields):
        raise UserError(f"arch {value!r}: expected the keys {', '.join(fields)}")
    if not all(type(number) is int and 0 < number <= MAX_CHANNELS for number in value.values()):
        raise UserError(
            f"arch {dict(value)!r}: expected positive whole numbers up to {MAX_CHANNELS}"
        )
    arch = Arch(**value)
    if arch.depth not in BLOCKS_PER_STAGE:
        raise UserError(f"depth {arch.depth}: give {', '.join(map(str, BLOCKS_PER_STAGE))}")
    return arch


def infer_arch(shapes: Mapping[str, tuple[int, ...]]) -> Arch:
    """The architecture that a torchvision-named backbone's shapes belong to.

    Args:
        shapes: Tensor name -> shape; conv1.weight, layer1.0.conv1.weight ..

    Raises:
        UserError: If the names are no ResNet's or the number of blocks is none that is known.
    """
    stem = shapes.get("conv1.weight")
    first = shapes.get("layer1.0.conv1.weight")
    if stem is None or first is None:
        raise UserError("no conv1.weight and layer1.0.conv1.weight: this is no ResNet's state_dict")
    third = shapes.get("layer1.0.conv3.weight")
    for name, shape in (("conv1", stem), ("layer1.0.conv1", first), ("layer1.0.conv3", third)):
        if shape is not None and len(shape) != 4:
            raise UserError(f"{name}.weight has shape {shape}: no convolution's")
    num_blocks = tuple(
        len({name.split(".")[1] for name in shapes if name.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    for depth, blocks in BLOCKS_PER_STAGE.items():
        if blocks == num_blocks and (depth >= 50) == (third is not None):
            return read_arch(
                {
                    "depth": depth,
                    "width_per_group": first[0],
                    "stem_channels": stem[0],
                    "res2_channels": third[0] if third else first[0],
                }
            )
    raise UserError(f"{num_blocks} blocks per stage fit none of ResNet-18, 34, 50, 101, 152")


def tensor_shapes(arch: Arch) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a ResNet without classifier and without batch counters.

    Names and order are those of torchvision's state_dict.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def add(conv: str, norm: str, out: int, channels: int, kernel: int) -> None:
        shapes[f"{conv}.weight"] = (out, channels, kernel, kernel)
        for field in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{field}"] = (out,)

    add("conv1", "bn1", arch.stem_channels, 3, 7)
    channels = arch.stem_channels
    for stage, num_blocks in enumerate(arch.blocks_per_stage):
        width, out = arch.width_per_group << stage, arch.res2_channels << stage
        for block in range(num_blocks):
            prefix, inner = f"layer{stage + 1}.{block}", channels
            convs = [(width, 1), (width, 3), (out, 1)] if arch.is_bottleneck else [(out, 3)] * 2
            for number, (conv_out, kernel) in enumerate(convs, start=1):
                add(f"{prefix}.conv{number}", f"{prefix}.bn{number}", conv_out, inner, kernel)
                inner = conv_out
            if block == 0 and (stage > 0 or channels != out):
                add(f"{prefix}.downsample.0", f"{prefix}.downsample.1", out, channels, 1)
            channels = out
    return shapes
