"""Read `.safetensors` files, as timm and others publish weights: a JSON header and plain bytes.

Layout (https://github.com/huggingface/safetensors): eight bytes with the header's length (little
endian), the header {name: {"dtype", "shape", "data_offsets": [begin, end]}}, then the tensors'
bytes, row by row. Nothing in such a file can run.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # the format's own bound


def load(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file to the CPU.

    Args:
        path: A `.safetensors` file.
    Returns:
        Name -> tensor; `__metadata__` is left out.
    Raises:
        UserError: If the file is missing, cut off, or its header and its bytes do not agree.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a .safetensors file")
    content = path.read_bytes()
    try:
        num_header_bytes = int.from_bytes(content[:8], "little")
        if len(content) < 8 or not 2 <= num_header_bytes <= min(
            _MAX_HEADER_BYTES, len(content) - 8
        ):
            raise ValueError("its header does not fit into the file")
        header = json.loads(content[8 : 8 + num_header_bytes])
        if not isinstance(header, dict):
            raise ValueError("its header is no table of tensors")
        header.pop("__metadata__", None)
        data = memoryview(content)[8 + num_header_bytes :]
        return {name: _tensor(name, entry, data) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, RecursionError, RuntimeError) as error:
        raise UserError(
            f"{path}: not a readable .safetensors file ({error}); copy the file again"
        ) from error


def _tensor(name: str, entry: Any, data: memoryview) -> Tensor:
    """One tensor, copied out of the file's bytes.

    Raises:
        ValueError: If its shape, type and place do not agree.
    """
    kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if kind not in _TYPES:
        raise ValueError(f"{name}: type {kind!r} is none of {', '.join(_TYPES)}")
    numbers = [*shape, begin, end]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{name}: shape {shape} and offsets {begin, end} are no whole numbers")
    dtype = _TYPES[kind]
    num_bytes = math.prod(shape) * dtype.itemsize
    if end - begin != num_bytes or end > len(data):
        raise ValueError(
            f"{name}: {end - begin} bytes at {begin}, {shape} of {kind} are {num_bytes}"
        )
    if num_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data[begin:end]), dtype=dtype).reshape(shape)
