"""Read `.pkl` and foreign `.pth` files without running anything that is written in them.

A pickle may name any importable function and have it called while it is read. Here only a short
list of constructors of plain data is real; every other name becomes an inert placeholder, so a
checkpoint that also holds somebody's trainer or config object still gives up its tensors.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import io
import pickle
import struct
import warnings
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import IO, Any, ClassVar

import numpy as np
import torch
from torch import _utils as torch_utils

from common.errors import UserError
from detection import safetensors_file

# What a damaged or hostile file makes the readers raise.
_READ_ERRORS = (
    *(pickle.UnpicklingError, EOFError, RuntimeError, TypeError, ValueError),
    *(AttributeError, IndexError, KeyError, MemoryError, OverflowError, UnicodeError),
    *(AssertionError, ArithmeticError, BufferError, ImportError, NameError, struct.error),
)


class Placeholder:
    """Stands where a pickle named a class or function that is not on the list."""

    qualified_name: ClassVar[str] = "unknown"

    def __new__(cls, *_args: object, **_kwargs: object) -> Placeholder:
        """Accept any arguments, as the class it stands for may have."""
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Drop the arguments."""

    def __call__(self, *_args: object, **_kwargs: object) -> Placeholder:
        """Do nothing, for pickles that call what a function returned."""
        return self

    def __setstate__(self, state: object) -> None:
        """Drop the state that the pickle would have restored."""

    def __setitem__(self, key: object, value: object) -> None:
        """Drop an item of a pickled dict subclass."""

    def append(self, item: object) -> None:
        """Drop an item of a pickled list subclass."""

    def extend(self, items: object) -> None:
        """Drop items of a pickled list subclass."""

    def add(self, item: object) -> None:
        """Drop an item of a pickled set subclass."""

    def __repr__(self) -> str:
        """Name what it stands for."""
        return f"<placeholder for {self.qualified_name}>"


def _plain_dtype(dtype: object) -> np.dtype:
    """The dtype if its elements are plain numbers or text, not Python objects."""
    if not isinstance(dtype, np.dtype) or dtype.hasobject:
        raise pickle.UnpicklingError(f"dtype {dtype!r} is not plain data")
    return dtype


def _as_bytes(data: object) -> bytes:
    """Buffer content; Python 2 pickles, read as latin1, hold text in its place."""
    if isinstance(data, str):
        return data.encode("latin1")
    if isinstance(data, bytes | bytearray):
        return bytes(data)
    raise pickle.UnpicklingError(f"a buffer of type {type(data).__name__} is not plain data")


def _new_array(_subtype: object, _shape: object, _typecode: object) -> np.ndarray:
    """What numpy's pickles call first: an empty array; its state follows."""
    return np.ndarray((0,), dtype=np.int8)


def _array_over(data: object, dtype: object, shape: tuple[int, ...], order: str) -> np.ndarray:
    """What numpy's pickles of protocol 5 call: an array with the bytes given."""
    array = np.frombuffer(_as_bytes(data), dtype=_plain_dtype(dtype))
    return array.reshape(shape, order="F" if order == "F" else "C").copy()


def _scalar(dtype: object, data: object = b"") -> Any:
    """What numpy's pickles call for one number."""
    return np.frombuffer(_as_bytes(data), dtype=_plain_dtype(dtype))[0]


def _encode(text: str, _encoding: str = "latin1") -> bytes:
    """What pickles of protocols 0 to 2 call for bytes."""
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """What pickles of protocols 0 to 2 call for empty bytes."""
    return b""


_NUMPY = {
    "ndarray": np.ndarray,
    "dtype": np.dtype,
    "_reconstruct": _new_array,
    "_frombuffer": _array_over,
    "scalar": _scalar,
}
_NUMPY_HOMES = ("numpy", *(f"numpy.{core}.{file}" for core in ("core", "_core")
                           for file in ("multiarray", "numeric")))  # fmt: skip
_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")


def _plain_names() -> dict[tuple[str, str], Any]:
    """Module and name of every constructor that is real in a `.pkl`."""
    table: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("_codecs", "encode"): _encode,
    }
    for builtins in ("builtins", "__builtin__"):
        table[builtins, "bytes"] = _no_bytes
        table.update({(builtins, kind.__name__): kind for kind in (set, frozenset, complex)})
        table.update({(builtins, kind.__name__): kind for kind in (bytearray, slice)})
    for home in _NUMPY_HOMES:
        table.update({(home, name): value for name, value in _NUMPY.items()})
    return table


def _torch_names() -> dict[tuple[str, str], Any]:
    """The names that `torch.save` writes for tensors."""
    rebuild = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
    table = {("torch._utils", name): getattr(torch_utils, name) for name in rebuild}
    table.update(
        {("torch", f"{kind}Storage"): getattr(torch, f"{kind}Storage") for kind in _STORAGES}
    )
    table.update({("torch", name): getattr(torch, name) for name in ("Size", "device")})
    return table


class RestrictedUnpickler(pickle._Unpickler):
    """An unpickler that knows plain data and numpy arrays, nothing else.

    It is the one in Python, not the one in C: that one keeps a table as long as the largest index
    in the file, so that one wrong byte makes it ask for tens of gigabytes. Files of weights have
    few objects and large ones; they are read as fast.
    """

    allowed: ClassVar[dict[tuple[str, str], Any]] = _plain_names()
    # Typeshed takes this class for the one in C.
    dispatch: ClassVar[dict[int, Any]] = dict(
        pickle._Unpickler.dispatch  # pyright: ignore[reportAttributeAccessIssue]
    )
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        """The real constructor if it is on the list, a fresh placeholder class otherwise."""
        known = self.allowed.get((module, name))
        if known is not None:
            return known
        return type("Placeholder", (Placeholder,), {"qualified_name": f"{module}.{name}"})

    def load_build(self) -> None:
        """Give an object its state; functions and classes have none that a file may set."""
        owner = self.stack[-2] if len(self.stack) > 1 else None
        if owner is None or isinstance(owner, type | FunctionType | BuiltinFunctionType):
            raise pickle.UnpicklingError("state for something that has none")
        super().load_build()  # pyright: ignore[reportAttributeAccessIssue]

    dispatch[pickle.BUILD[0]] = load_build


class TorchUnpickler(RestrictedUnpickler):
    """The same and tensors, for `torch.load(pickle_module=...)`."""

    allowed: ClassVar[dict[tuple[str, str], Any]] = _plain_names() | _torch_names()


def load(file: IO[bytes], *, encoding: str = "latin1") -> Any:
    """Read one pickle of plain data; can stand in for `pickle.load`.

    Args:
        file: Open binary file.
        encoding: How strings in pickles of Python 2 are read.
    Returns:
        Plain data and numpy arrays; anything else is a `Placeholder`.
    Raises:
        UserError: If the file is damaged.
    """
    try:
        return RestrictedUnpickler(file, encoding=encoding).load()
    except _READ_ERRORS as error:
        raise UserError(
            f"{getattr(file, 'name', 'the file')}: not a readable pickle of plain data and numpy "
            f"arrays ({error}); copy it again, or make it anew with tools/convert_to_d2.py"
        ) from error


def load_pkl(path: Path | str) -> Any:
    """Read a `.pkl` file of weights; see `load`."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give the path of a .pkl of weights")
    with open(path, "rb") as file:
        return load(file)


def _pickle_module() -> ModuleType:
    """A stand-in for the module `pickle` as `torch.load` uses it."""
    module = ModuleType("restricted_pickle")
    module.__dict__.update(
        Unpickler=TorchUnpickler,
        UnpicklingError=pickle.UnpicklingError,
        load=lambda file, **options: TorchUnpickler(file, **options).load(),
        loads=lambda data, **options: TorchUnpickler(io.BytesIO(data), **options).load(),
    )
    return module


def load_torch(path: Path | str) -> Any:
    """Read a `torch.save` file to the CPU; unknown classes become placeholders.

    torch's own `weights_only` reader goes first; it refuses files with any unknown class, which
    this module's list then reads.

    Args:
        path: A `.pth`, `.pt` or `.ckpt` file.
    Returns:
        Plain data and tensors; anything else is a `Placeholder`.
    Raises:
        UserError: If the file is missing or cannot be read.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give the path of a checkpoint")
    try:
        with contextlib.suppress(*_READ_ERRORS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on tensors that nobody reads
            return torch.load(path, map_location="cpu", weights_only=True)
        return torch.load(
            path, map_location="cpu", weights_only=False, pickle_module=_pickle_module()
        )
    except (*_READ_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # seeking in a damaged zip
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise UserError(
            f"{path}: not a readable PyTorch checkpoint ({reason}); copy the file again, or save "
            "its state_dict with torch.save"
        ) from error


def load_weights(path: Path | str) -> Any:
    """Read weights of any of the three kinds: `.pkl`, `.safetensors`, or what `torch.save` wrote.

    Raises:
        UserError: If the file is missing or damaged.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return safetensors_file.load(path)
    if path.suffix == ".pkl" and path.is_file():
        with open(path, "rb") as file:
            if file.read(2) != b"PK":  # torch.save writes zip archives under any name
                return load_pkl(path)
    return load_torch(path)
