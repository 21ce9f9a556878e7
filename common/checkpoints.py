"""Checkpoints of any program, read without running anything that is written in them.

A pickle may name any importable function and have it called while it is read. Here only a short
list of constructors of plain data is real; every other name becomes an inert placeholder, so a
checkpoint that also holds somebody's trainer or config object still gives up its tensors.

Damage is seen by our checkpoints' checksum, and by the CRCs of the zip archive that `torch.save`
writes, which torch itself does not check.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import io
import json
import math
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import IO, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch import _utils as torch_utils

from common.errors import UserError

FORMAT = "fa-pretrain-1"  # of our own checkpoints
# Keys under which training scripts keep the network, and its moving average.
WRAPPERS = ("state_dict", "model", "model_state_dict", "blobs")
EMA_WRAPPERS = ("state_dict_ema", "model_ema")
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
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
    """What numpy's pickles of protocol 5 call: an array with these bytes."""
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
# What `torch.save` writes for tensors.
_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
_TORCH = ("Size", "device", *(f"{kind}Storage" for kind in _STORAGES))


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


class RestrictedUnpickler(pickle._Unpickler):
    """An unpickler that knows plain data and numpy arrays, nothing else.

    It is the one in Python, not the one in C: that one keeps a table as long as the largest index
    in the file, so that one wrong byte makes it allocate tens of gigabytes. Files of weights have
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

    allowed: ClassVar[dict[tuple[str, str], Any]] = (
        _plain_names()
        | {("torch", name): getattr(torch, name) for name in _TORCH}
        | {("torch._utils", name): getattr(torch_utils, name) for name in _REBUILD}
    )


def _reason(error: Exception) -> str:
    """The first sentence of an error of a reader, and a remedy; torch adds its C++ stack."""
    first = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
    return f"{first}; copy it again"


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
        name = getattr(file, "name", "the file")
        raise UserError(
            f"{name}: not a readable pickle of plain data ({_reason(error)})"
        ) from error


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
        UserError: If the file cannot be read.
    """
    try:
        with contextlib.suppress(*_READ_ERRORS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about tensors that nobody reads
            return torch.load(path, map_location="cpu", weights_only=True)
        return torch.load(
            path, map_location="cpu", weights_only=False, pickle_module=_pickle_module()
        )
    except (*_READ_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # seeking in a damaged zip
            raise
        raise UserError(f"{path}: not a readable PyTorch checkpoint ({_reason(error)})") from error


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a `.safetensors` file to the CPU; nothing in such a file can run.

    Layout (https://github.com/huggingface/safetensors): eight bytes with the header's length
    (little endian), the header {name: {"dtype", "shape", "data_offsets": [begin, end]}}, then the
    tensors' bytes, row by row.

    Args:
        path: A `.safetensors` file.
    Returns:
        Name -> tensor; `__metadata__` is left out.
    Raises:
        UserError: If it is cut off, or its header and its bytes do not agree.
    """
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = {}
    try:
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            dtype, count = _TYPES[kind], math.prod(shape)
            if begin < 0 or end - begin != count * dtype.itemsize or start + end > len(content):
                raise ValueError(f"{name}: bytes {begin} to {end} hold no {shape} of {kind}")
            data = content[start + begin : start + end]
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            tensors[name] = flat.reshape(shape)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise UserError(f"{path}: not a readable .safetensors file ({_reason(error)})") from error
    return tensors


def read(path: Path | str) -> Any:
    """Read weights of any kind: `.pkl`, `.safetensors`, or what `torch.save` wrote, whole.

    Raises:
        UserError: If the file is missing or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a checkpoint")
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    is_zip = zipfile.is_zipfile(path)  # torch.save writes zip archives under any name
    if path.suffix == ".pkl" and not is_zip:
        with open(path, "rb") as file:
            return load(file)
    content = load_torch(path)
    if isinstance(content, Mapping) and "checksum" in content and content.get("format") == FORMAT:
        check_sum(content, path)
    elif is_zip:
        with zipfile.ZipFile(path) as archive:
            try:
                broken = archive.testzip()
            except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError) as error:
                broken = str(error)
        if broken is not None:
            raise UserError(f"{path}: is damaged at {broken} (its CRC differs); copy it again")
    return content


def check_sum(state: Mapping[str, Any], path: Path) -> None:
    """Compare a state with the checksum in it, if there is one; older ones have none.

    Raises:
        UserError: If they differ.
    """
    if "checksum" in state and state["checksum"] != checksum(state):
        raise UserError(f"checkpoint {path} is damaged (checksum): take one from checkpoints/")


def checksum(value: Any) -> str:
    """Hash of a nested state: keys, plain values, and the bytes of tensors (blake2b, hexadecimal).

    The key ``checksum`` of the outermost dict is left out.
    """
    digest = hashlib.blake2b(digest_size=16)
    outermost = {k: v for k, v in value.items() if k != "checksum"}
    _hash_into(digest, outermost)
    return digest.hexdigest()


def _hash_into(digest: Any, value: Any) -> None:
    if isinstance(value, dict):
        digest.update(f"dict {len(value)};".encode())
        for key, item in value.items():
            digest.update(f"{key!r}:".encode())
            _hash_into(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)};".encode())
        for item in value:
            _hash_into(digest, item)
    elif isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"tensor {plain.dtype} {tuple(plain.shape)};".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    else:
        digest.update(f"{value!r};".encode())


def nested(checkpoint: Mapping[str, Any], keys: Sequence[str]) -> Mapping[str, Any] | None:
    """The first table that a checkpoint holds under one of the keys."""
    tables = (checkpoint[key] for key in keys if isinstance(checkpoint.get(key), Mapping))
    return next(tables, None)


def named(state: Mapping[Any, Any]) -> Mapping[str, Any]:
    """A state dict.

    Raises:
        UserError: If its keys are not names.
    """
    if not all(isinstance(key, str) for key in state):
        raise UserError("its keys are not names of tensors; save the network's state_dict")
    return state
