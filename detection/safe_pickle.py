"""Read `.pkl` and foreign `.pth` files without running anything that is written in them.

A pickle may name any importable function and have it called while it is read. Here only a short list
of constructors of plain data is real; every other name becomes an inert placeholder, so a checkpoint
that also holds somebody's trainer or config object still gives up its tensors.
"""

from __future__ import annotations

import collections
import io
import pickle
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
import torch

from detection.errors import UserError


class Placeholder:
    """Stands where a pickle named a class or function that is not on the list; keeps what it was given."""

    qualified_name = "unknown"

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Keep the arguments; do nothing with them."""
        self.args, self.kwargs, self.state = args, kwargs, None
        self.items: list[object] = []

    def __new__(cls, *_args: object, **_kwargs: object) -> Placeholder:
        """Accept any arguments, as the class it stands for may have."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Keep the state the pickle would have restored."""
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        """Accept the items of a pickled dict subclass."""
        self.items.append((key, value))

    def append(self, item: object) -> None:
        """Accept the items of a pickled list subclass."""
        self.items.append(item)

    def __repr__(self) -> str:
        """Name what it stands for."""
        return f"<placeholder for {self.qualified_name}>"


def _reconstruct_array(subtype: object, shape: object, typecode: object) -> np.ndarray:
    """What numpy's pickles call first: an empty array, filled by its state afterwards."""
    return np.ndarray((0,), dtype=np.int8)


def _array_from_buffer(buffer: bytes, dtype: object, shape: tuple[int, ...], order: str) -> np.ndarray:
    """What numpy's protocol-5 pickles call: an array over the bytes given."""
    if not isinstance(dtype, np.dtype) or dtype.hasobject:
        raise pickle.UnpicklingError(f"array of dtype {dtype!r} is not plain data")
    array = np.frombuffer(buffer, dtype=dtype)
    return array.reshape(shape, order="F" if order == "F" else "C").copy()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """What Python 2 style pickles call for bytes."""
    return text.encode("latin1" if encoding == "latin1" else "utf-8")


def _scalar(dtype: object, data: object = None) -> object:
    """What numpy's pickles call for one number."""
    if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(data, bytes | str):
        raise pickle.UnpicklingError(f"scalar of dtype {dtype!r} is not plain data")
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype=dtype)[0]


_NUMPY: dict[str, Any] = {
    "ndarray": np.ndarray,
    "dtype": np.dtype,
    "_reconstruct": _reconstruct_array,
    "_frombuffer": _array_from_buffer,
    "scalar": _scalar,
}
_NUMPY_MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
_PLAIN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,
    **{("builtins", kind.__name__): kind for kind in (set, frozenset, complex, bytearray, slice, range)},
    **{("__builtin__", kind.__name__): kind for kind in (set, frozenset, complex, bytearray, slice)},
}
_TORCH_STORAGES = tuple(
    f"{kind}Storage"
    for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "Untyped")
)


def _torch_globals() -> dict[tuple[str, str], Any]:
    """The names torch's own weights pickles need."""
    rebuild = torch._utils
    table: dict[tuple[str, str], Any] = {
        ("torch._utils", name): getattr(rebuild, name)
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
    }
    table.update({("torch", name): getattr(torch, name) for name in _TORCH_STORAGES})
    table["torch", "Size"] = torch.Size
    table["torch", "device"] = torch.device
    for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"):
        table["torch", name] = getattr(torch, name)
    return table


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that knows plain data, numpy arrays and (for `torch.load`) tensors, nothing else."""

    allowed = {**_PLAIN, **{(m, n): value for m in _NUMPY_MODULES for n, value in _NUMPY.items()}}

    def find_class(self, module: str, name: str) -> Any:
        """The real constructor if it is on the list, a fresh placeholder class otherwise."""
        known = self.allowed.get((module, name))
        if known is not None:
            return known
        return type(name, (Placeholder,), {"qualified_name": f"{module}.{name}"})


class TorchUnpickler(RestrictedUnpickler):
    """The same for `torch.load(pickle_module=...)`."""

    allowed = {**RestrictedUnpickler.allowed, **_torch_globals()}


def load(file: IO[bytes], *, encoding: str = "latin1", **_ignored: object) -> Any:
    """`pickle.load` for plain data; same calling convention, so that it can stand in for it.

    Args:
        file: Open binary file.
        encoding: How strings of Python 2 pickles are read.
    Returns:
        Plain data and numpy arrays; anything else is a `Placeholder`.
    Raises:
        UserError: If the file is damaged or is no pickle of plain data.
    """
    name = getattr(file, "name", "the file")
    try:
        return RestrictedUnpickler(file, encoding=encoding).load()
    except (pickle.UnpicklingError, EOFError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise UserError(
            f"{name}: not a readable pickle of plain data and numpy arrays ({error}); copy the file again, or "
            "convert the checkpoint anew with tools/convert_to_d2.py"
        ) from error


def load_pkl(path: Path | str) -> Any:
    """Read a `.pkl` file of weights; see `load`."""
    with open(path, "rb") as file:
        return load(file)


def _torch_pickle_module() -> ModuleType:
    """A stand-in for the `pickle` module as `torch.load` uses it."""
    module = ModuleType("restricted_pickle")
    module.__dict__.update(Unpickler=TorchUnpickler, UnpicklingError=pickle.UnpicklingError)
    module.__dict__["load"] = lambda file, **options: TorchUnpickler(file, **options).load()
    module.__dict__["loads"] = lambda data, **options: TorchUnpickler(io.BytesIO(data), **options).load()
    return module


def load_torch(path: Path | str) -> Any:
    """Read a `torch.save` file to the CPU; unknown classes become placeholders.

    Tries torch's own `weights_only` reader first and falls back to this module's list.

    Args:
        path: A `.pth`, `.pt` or `.ckpt` file.
    Returns:
        Plain data and tensors; anything else is a `Placeholder`.
    Raises:
        UserError: If the file cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        pass
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_torch_pickle_module())
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: not a readable PyTorch checkpoint ({reason}); copy the file again, or save its state_dict "
            "with torch.save"
        ) from error
