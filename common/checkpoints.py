"""Checkpoints of any program, read without running anything that is written in them.

A pickle may name any importable function and have it called while it is read. Here a name means one
of a few functions of this module, which build plain data and bound their arguments; every other
name becomes an inert placeholder, so a checkpoint that also holds somebody's trainer or config
object still gives up its tensors. torch's own readers, `weights_only` too, do not bound what a file
may ask for (a `bytearray`, a deflated record, a storage larger than its record), so the zip archive
that `torch.save` writes, and the format before it, are read here as well.

Memory and time stay in proportion to the file. Damage is seen by our checkpoints' checksum, and by
the CRCs of the zip archive.
"""

from __future__ import annotations

import collections
import hashlib
import io
import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import open_regular

FORMAT = "fa-pretrain-1"  # of our own checkpoints
# Keys under which training scripts keep the network.
WRAPPERS = ("state_dict", "model", "model_state_dict", "blobs")
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Bounds that no checkpoint of a network comes near.
MAX_OPCODES = 1_000_000  # of a pickle; each may take some 300 bytes of memory
MAX_UNKNOWN_NAMES = 2000  # classes; each takes some 2 KB
MAX_RARE_KEYS = 1000  # keys of tables whose hashes a file could choose to be the same
MAX_DEPTH = 100  # of tables in tables
MAX_ITEMS = 4_000_000  # of all tables, each counted as often as it is referred to
MAX_DIRECTORY_BYTES = 16 << 20  # of a zip archive, some 100 for each record
MAX_HEADER_BYTES = 16 << 20  # of a .safetensors file
_CHUNK = 16 << 20
# What a damaged or hostile file makes the readers raise.
_READ_ERRORS = (
    *(pickle.UnpicklingError, EOFError, RuntimeError, TypeError, ValueError),
    *(AttributeError, IndexError, KeyError, MemoryError, OverflowError, UnicodeError),
    *(AssertionError, ArithmeticError, BufferError, ImportError, NameError, struct.error),
    *(zipfile.BadZipFile, NotImplementedError),
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

    def __repr__(self) -> str:
        """Name what it stands for."""
        return f"<placeholder for {self.qualified_name}>"


def _refuse(reason: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(reason)


# -- what the names in a pickle stand for ----------------------------------------------------------


class _Dtype:
    """A numpy dtype of plain numbers or text, for what `numpy.dtype` is called with in pickles."""

    def __init__(self, name: object, _align: object = False, _copy: object = False) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[biufcSU]\d{1,9}", name):
            raise _refuse("a dtype of something else than plain numbers or text")
        self.value = np.dtype(name)

    def set_state(self, state: object) -> None:
        """Take the byte order; any other state is refused."""
        size = (-1, self.value.itemsize)
        match state:
            case (3, "<" | ">" | "|" | "=" as order, None, None, None, int(length), int(), 0 | 8):
                if length in size:
                    self.value = self.value.newbyteorder(order)
                    return
        raise _refuse("a dtype's state is more than a byte order")


def _as_bytes(data: object) -> bytes:
    """Buffer content; Python 2 pickles, read as latin1, hold text in its place."""
    if isinstance(data, str):
        return data.encode("latin1")
    if isinstance(data, bytes | bytearray):
        return bytes(data)
    raise _refuse(f"a buffer of type {type(data).__name__} is not plain data")


def _whole_numbers(values: object) -> tuple[int, ...]:
    """A shape, or strides."""
    sizes: tuple[Any, ...] = (None,)
    if isinstance(values, tuple | list) and len(values) <= 32:
        sizes = tuple(values)
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in sizes):
        raise _refuse("a shape that is no few whole numbers")
    return sizes


def _new_array(_subtype: object, _shape: object, _typecode: object) -> np.ndarray:
    """What numpy's pickles call first: an empty array; its state follows."""
    return np.ndarray((0,), dtype=np.int8)


def _array_state(data: object, dtype: object, shape: object) -> tuple[bytes, np.dtype, Any]:
    """Bytes, type and shape of an array, which must agree."""
    content, sizes = _as_bytes(data), _whole_numbers(shape)
    if not isinstance(dtype, _Dtype):
        raise _refuse("an array without a plain dtype")
    if math.prod(sizes) * dtype.value.itemsize != len(content):
        raise _refuse(f"{len(content)} bytes hold no {sizes} of {dtype.value}")
    return content, dtype.value, sizes


def _array_over(data: object, dtype: object, shape: object, order: object) -> np.ndarray:
    """What numpy's pickles of protocol 5 call: an array with these bytes."""
    content, kind, sizes = _array_state(data, dtype, shape)
    array = np.frombuffer(content, kind) if content else np.empty(0, kind)
    return array.reshape(sizes, order="F" if order == "F" else "C").copy()


def _scalar(dtype: object, data: object = b"") -> Any:
    """What numpy's pickles call for one number."""
    content, kind, _ = _array_state(data, dtype, (1,))
    return np.frombuffer(content, kind)[0]


def _encode(text: str, _encoding: str = "latin1") -> bytes:
    """What pickles of protocols 0 to 2 call for bytes."""
    return text.encode("latin1")


def _items(*values: object) -> list[Any]:
    """Arguments of a constructor: nothing, or one list of plain keys."""
    if len(values) > 1 or not all(isinstance(value, list | tuple) for value in values):
        raise _refuse("a set or table of something else than a list")
    return [item for value in values if isinstance(value, list | tuple) for item in value]


def _bytes(*values: object) -> bytes:
    """`bytes` and `bytearray` take no length, which could be any."""
    if len(values) == 2 and isinstance(values[0], str):
        return _encode(values[0])
    return _as_bytes(values[0]) if values else b""


def _complex(real: float = 0.0, imaginary: float = 0.0) -> complex:
    if not isinstance(real, int | float) or not isinstance(imaginary, int | float):
        raise _refuse("a complex number of something else than two numbers")
    return complex(real, imaginary)


class _Storage:
    """The bytes that tensors are views of.

    Attributes:
        dtype: Of its elements.
        data: uint8 [n].
    """

    def __init__(self, dtype: torch.dtype, data: Tensor) -> None:
        self.dtype, self.data = dtype, data


def _tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> Any:
    """What pickles of torch call for a tensor: a view of its storage."""
    if not isinstance(storage, _Storage):
        return Placeholder()  # of a kind that is not on the list
    return _strided(storage.data.view(storage.dtype), offset, size, stride)


def _tensor_v3(
    storage: object, offset: object, size: object, stride: object,
    _grad: object, _hooks: object, dtype: object, *_: object,
) -> Any:  # fmt: skip
    """The same for a storage without a type."""
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
        return Placeholder()
    return _strided(storage.data.view(dtype), offset, size, stride)


def _strided(flat: Tensor, offset: object, size: object, stride: object) -> Tensor:
    sizes, strides = _whole_numbers(size), _whole_numbers(stride)
    (start,) = _whole_numbers((offset,))
    if len(sizes) != len(strides) or math.prod(sizes) >= 1 << 62:
        raise _refuse(f"a tensor of shape {sizes} with strides {strides}")
    end = start + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) + 1
    if math.prod(sizes) and end > flat.numel():
        raise _refuse(f"a tensor of shape {sizes} in a storage of {flat.numel()} elements")
    return torch.as_strided(flat, sizes, strides, start if math.prod(sizes) else 0)


def _parameter(data: Any, *_: object) -> Any:
    """A parameter is its tensor."""
    return data


def _subclass(function: object, _kind: object, args: tuple[Any, ...], _state: object) -> Any:
    """A tensor with attributes, or of a subclass, is its tensor."""
    return function(*args) if function in _REBUILD.values() else Placeholder()  # pyright: ignore


def _size(*sizes: object) -> tuple[int, ...]:
    return _whole_numbers(sizes[0] if len(sizes) == 1 else sizes)


def _device(name: object = "", *_: object) -> str:
    return str(name)[:40]


_NUMPY = {
    "dtype": _Dtype, "_reconstruct": _new_array, "_frombuffer": _array_over, "scalar": _scalar,
}  # fmt: skip
_NUMPY_HOMES = ("numpy", *(f"numpy.{core}.{file}" for core in ("core", "_core")
                           for file in ("multiarray", "numeric")))  # fmt: skip
_STORAGES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16,
    "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
}  # fmt: skip
# What `torch.save` writes for tensors.
_REBUILD: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": _tensor, "_rebuild_tensor_v2": _tensor, "_rebuild_tensor_v3": _tensor_v3,
    "_rebuild_parameter": _parameter, "_rebuild_parameter_with_state": _parameter,
}  # fmt: skip


def _known_names() -> dict[tuple[str, str], Any]:
    """Module and name of everything in a pickle that is no placeholder."""
    table: dict[tuple[str, str], Any] = {("_codecs", "encode"): _encode}
    for builtins in ("builtins", "__builtin__"):
        table |= {(builtins, name): _bytes for name in ("bytes", "bytearray")}
        table[builtins, "complex"] = _complex
    for home in _NUMPY_HOMES:
        table |= {(home, name): value for name, value in _NUMPY.items()}
    table |= {("torch", f"{kind}Storage"): dtype for kind, dtype in _STORAGES.items()}
    table |= {("torch.storage", "UntypedStorage"): torch.uint8}
    dtypes = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    table |= {("torch", name): value for name, value in dtypes.items()}
    table |= {("torch._utils", name): value for name, value in _REBUILD.items()}
    table |= {("torch._tensor", "_rebuild_from_type_v2"): _subclass}
    return table | {("torch", "Size"): _size, ("torch", "device"): _device}


# -- pickles ---------------------------------------------------------------------------------------


class _ExactFile:
    """A file whose reads are exact: a length beyond its end is refused before memory is taken."""

    def __init__(self, file: IO[bytes], num_bytes: int) -> None:
        self._file, self.left = file, num_bytes

    def read(self, num_bytes: int) -> bytes:
        """Read exactly so many bytes."""
        if not 0 <= num_bytes <= self.left:
            raise EOFError("it is cut off")
        self.left -= num_bytes
        return self._file.read(num_bytes)

    def readline(self) -> bytes:
        """Read to the end of the line."""
        line = self._file.readline(self.left)
        self.left -= len(line)
        return line


class _Counted(dict):
    """The unpickler's table of opcodes; counts those that are looked up."""

    left = MAX_OPCODES

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise _refuse(f"a pickle of more than {MAX_OPCODES:,} steps")
        return super().__getitem__(code)


class RestrictedUnpickler(pickle._Unpickler):
    """An unpickler that knows plain data, arrays and tensors, nothing else.

    It is the one in Python, not the one in C: that one keeps a table as long as the largest index
    in the file, so that one wrong byte makes it allocate tens of gigabytes. Files of weights have
    few objects and large ones; they are read as fast.

    Args:
        file: With exact reads.
        find_storage: Dtype, key and number of elements -> uint8 [n]: the bytes of a storage.
    """

    known: ClassVar[dict[tuple[str, str], Any]] = _known_names()
    # Typeshed takes this class for the one in C.
    dispatch: ClassVar[dict[int, Any]] = dict(
        pickle._Unpickler.dispatch  # pyright: ignore[reportAttributeAccessIssue]
    )
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self,
        file: _ExactFile,
        find_storage: Callable[[torch.dtype, str, int], Tensor] | None = None,
    ) -> None:
        super().__init__(file, encoding="latin1")  # pyright: ignore[reportArgumentType]
        self.dispatch = _Counted(type(self).dispatch)  # pyright: ignore[reportAttributeAccessIssue]
        self._find_storage = find_storage
        self._unknown: dict[tuple[str, str], type[Placeholder]] = {}
        self._num_rare_keys = 0
        self._own = {"set": self._set, "frozenset": self._frozenset}

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for; a placeholder class if it is not on the list."""
        place = module, name
        if place in self.known:
            return self.known[place]
        if module in ("builtins", "__builtin__") and name in self._own:
            return self._own[name]
        if place == ("collections", "OrderedDict"):
            return self._ordered_dict
        if place not in self._unknown:
            if len(self._unknown) >= MAX_UNKNOWN_NAMES:
                raise _refuse(f"more than {MAX_UNKNOWN_NAMES} unknown classes")
            shown = ascii(f"{module}.{name}"[:200])[1:-1]
            fields = {"qualified_name": shown}
            self._unknown[place] = type("Placeholder", (Placeholder,), fields)
        return self._unknown[place]

    def persistent_load(self, pid: Any) -> Any:
        """A storage of torch's formats."""
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), _, int(count), *rest):
                if self._find_storage is None or count < 0 or any(x is not None for x in rest):
                    raise _refuse("a storage where there can be none, or a view of one")
                return _Storage(dtype, self._find_storage(dtype, key, count))
            case ("storage", *_):
                return Placeholder()  # of a kind that is not on the list
            case ("module", kind, *_):  # a class, and beside it its source
                return kind
        raise _refuse("a persistent id that torch does not write")

    # Tables take keys whose hashes and comparisons are quick; whatever else a file has done to an
    # object in a pickle is dropped or refused.

    def _keys(self, keys: Iterable[Any]) -> None:
        for key in keys:
            if isinstance(key, str | bytes | Placeholder | None):
                continue
            if isinstance(key, int | float) and abs(key) < 1 << 60:
                continue
            parts = key if isinstance(key, tuple) else (key,)
            plain = str | bytes | int | float | np.number | Placeholder | None
            if len(parts) > 20 or not all(isinstance(part, plain) for part in parts):
                raise _refuse(f"a table with a {type(key).__name__} for a key")
            self._num_rare_keys += 1
            if self._num_rare_keys > MAX_RARE_KEYS:
                raise _refuse(f"more than {MAX_RARE_KEYS} keys that are tuples or huge numbers")

    def _set(self, *values: object) -> set[Any]:
        items = _items(*values)
        self._keys(items)
        return set(items)

    def _frozenset(self, *values: object) -> frozenset[Any]:
        return frozenset(self._set(*values))

    def _ordered_dict(self, *values: object) -> collections.OrderedDict[Any, Any]:
        pairs = _items(*values)
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise _refuse("a table of something else than pairs")
        self._keys(key for key, _ in pairs)
        return collections.OrderedDict(pairs)

    def load_build(self) -> None:
        """Give an object its state."""
        state = self.stack.pop()
        owner = self.stack[-1]
        if isinstance(owner, _Dtype):
            owner.set_state(state)
        elif type(owner) is np.ndarray:
            match state:
                case (int(), tuple(shape), dtype, bool(is_fortran) | int(is_fortran), data):
                    content, kind, sizes = _array_state(data, dtype, shape)
                    owner.__setstate__((1, sizes, kind, bool(is_fortran), content))  # pyright: ignore
                case _:
                    raise _refuse("an array's state is not shape, type and bytes")
        elif not isinstance(owner, Placeholder | collections.OrderedDict):
            raise _refuse("state for something that has none")

    def load_newobj(self) -> None:
        """Make an object of a class: of placeholders only."""
        self.stack.pop()
        self._replace_class()

    def load_newobj_ex(self) -> None:
        """The same with named arguments."""
        del self.stack[-2:]
        self._replace_class()

    def _replace_class(self) -> None:
        kind = self.stack[-1]
        if not isinstance(kind, type) or not issubclass(kind, Placeholder):
            raise _refuse("an object of something that is no class")
        self.stack[-1] = kind()

    def load_bytearray8(self) -> None:
        """A bytearray, of bytes that are there."""
        (length,) = struct.unpack("<Q", self.read(8))  # pyright: ignore
        self.stack.append(bytearray(self.read(length)))  # pyright: ignore

    def load_setitem(self) -> None:
        """One item of a table."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        """Items of a table."""
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        table = self.stack[-1]
        if isinstance(table, Placeholder):
            return
        if not isinstance(table, dict) or len(items) % 2:
            raise _refuse("items for something that is no table")
        self._keys(items[::2])
        table.update(zip(items[::2], items[1::2], strict=True))

    def load_dict(self) -> None:
        """A table and its items."""
        items = self.pop_mark()
        self.stack.append({})
        self._set_items(items)

    def load_append(self) -> None:
        """One item of a list."""
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        """Items of a list."""
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Placeholder):
            raise _refuse("items for something that is no list")

    def load_additems(self) -> None:
        """Items of a set."""
        items, target = self.pop_mark(), self.stack[-1]
        if isinstance(target, set):
            target |= self._set(items)
        elif not isinstance(target, Placeholder):
            raise _refuse("items for something that is no set")

    def load_frozenset(self) -> None:
        """A frozen set."""
        self.stack.append(self._frozenset(self.pop_mark()))

    dispatch.update({
        pickle.BUILD[0]: load_build, pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex, pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict, pickle.APPEND[0]: load_append, pickle.APPENDS[0]: load_appends,
        pickle.ADDITEMS[0]: load_additems, pickle.FROZENSET[0]: load_frozenset,
    })  # fmt: skip


def _check_extent(content: Any, num_bytes: int) -> None:
    """Refuse tables and tensors that are small in a file, and large for who walks through them.

    A table that is referred to twice counts twice: ten levels of ten references are 10^10 items.
    A tensor counts the elements that it shows: with strides of 0, one number is any number of them.
    """
    num_items, num_shown, level = 0, 0, [content]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                below += value
                below += value.values()
            elif isinstance(value, list | tuple | set | frozenset):
                below += value
            elif isinstance(value, Tensor | np.ndarray):
                num_shown += math.prod(value.shape) * value.dtype.itemsize
            elif isinstance(value, str | bytes | bytearray):
                num_shown += len(value)
            elif isinstance(value, int) and value.bit_length() > 4096:
                raise _refuse("a number of more than 4096 bits")
            if num_items + len(below) > MAX_ITEMS:
                raise _refuse(f"tables of more than {MAX_ITEMS:,} items")
        num_items += len(below)
        if num_shown > 8 * num_bytes + (64 << 20):
            raise _refuse(f"its tensors claim {num_shown:,} bytes, the file has {num_bytes:,}")
        level = below
        if not level:
            return
    raise _refuse(f"tables nested deeper than {MAX_DEPTH}")


def _reason(error: Exception) -> str:
    """The first sentence of an error of a reader, and a remedy."""
    first = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
    return f"{first:.200}; copy it again"


def load(file: IO[bytes], *, encoding: str = "latin1") -> Any:
    """Read one pickle of plain data; can stand in for `pickle.load`.

    Args:
        file: Open binary file, at its beginning.
        encoding: How strings in pickles of Python 2 are read; this is the only one.
    Returns:
        Plain data and numpy arrays; anything else is a `Placeholder`.
    Raises:
        UserError: If the file is damaged.
    """
    assert encoding == "latin1"
    try:
        num_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        content = RestrictedUnpickler(_ExactFile(file, num_bytes)).load()
        _check_extent(content, num_bytes)
    except _READ_ERRORS as error:
        name = getattr(file, "name", "the file")
        raise UserError(
            f"{name}: not a readable pickle of plain data ({_reason(error)})"
        ) from error
    return content


# -- what torch.save writes ------------------------------------------------------------------------

_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


def _read_zip(file: IO[bytes], num_bytes: int, path: Path) -> Any:
    """The archive that `torch.save` writes: data.pkl, and a record for each storage, all stored."""
    _check_directory(file, num_bytes)
    with zipfile.ZipFile(file) as archive:
        # Records are as large as they seem, and each is there once.
        records = {info.filename: info for info in archive.infolist()}
        places = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(places) != 1:
            raise _refuse("a zip archive without the data.pkl of torch.save")
        folder = places[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in records:
            raise UserError(
                f"{path}: is a TorchScript program; save the weights instead: "
                "torch.save(torch.jit.load(PATH).state_dict(), OUT)"
            )
        for name, info in records.items():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise _refuse(f"record {name!r:.80} is compressed, which torch.save never does")
        claimed = sum(info.file_size for info in archive.infolist())
        if claimed > num_bytes or len(records) < len(archive.infolist()):
            raise _refuse("records that lie over each other, or have one name")

        def read_record(name: str) -> Tensor:
            if folder + name not in records:
                raise _refuse(f"no record {name!r:.80}")
            info = records[folder + name]
            data = torch.empty(info.file_size, dtype=torch.uint8)
            view, place = data.numpy(), 0
            try:
                with archive.open(info) as source:  # which compares the CRC at the end
                    while part := source.read(_CHUNK):
                        view[place : place + len(part)] = np.frombuffer(part, np.uint8)
                        place += len(part)
            except zipfile.BadZipFile as error:
                if "CRC" not in str(error):
                    raise
                raise UserError(
                    f"{path}: is damaged at {info.filename:.80} (its CRC differs); copy it again"
                ) from None
            if place != info.file_size:
                raise EOFError("it is cut off")
            return data

        if f"{folder}byteorder" in records and bytes(read_record("byteorder").numpy()) != b"little":
            raise _refuse("big-endian numbers")
        storages: dict[str, Tensor] = {}

        def find_storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
            if key not in storages:
                storages[key] = read_record(f"data/{key}")
            if storages[key].numel() != count * dtype.itemsize:
                raise _refuse(f"storage {key!r:.40} of {count} elements in another number of bytes")
            return storages[key]

        data = read_record("data.pkl").numpy().tobytes()
        return RestrictedUnpickler(_ExactFile(io.BytesIO(data), len(data)), find_storage).load()


def _check_directory(file: IO[bytes], num_bytes: int) -> None:
    """Refuse a directory of records that zipfile would need long and much memory for.

    The archive ends in its end record, and before it, if it is large, in those of zip64 (APPNOTE
    4.3.14 to 4.3.16).
    """
    file.seek(max(0, num_bytes - 98))
    end = file.read().rjust(98, b"\0")
    if end[76:80] != b"PK\5\6" or end[96:] != b"\0\0":
        raise _refuse("a zip archive that is cut off")
    size = int.from_bytes(end[88:92], "little")
    if end[56:60] == b"PK\6\7":
        size = int.from_bytes(end[40:48], "little")
    if size > MAX_DIRECTORY_BYTES:
        raise _refuse(f"a zip directory of {size:,} bytes")
    file.seek(0)


def _read_legacy(file: IO[bytes], num_bytes: int) -> Any:
    """What `torch.save` wrote before 1.6: four pickles, keys of storages, and their bytes."""
    source = _ExactFile(file, num_bytes)
    storages: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def find_storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        size = count * dtype.itemsize
        if key not in storages:
            if size > num_bytes - sum(data.numel() for data in storages.values()):
                raise _refuse(f"storages larger than the file, which has {num_bytes:,} bytes")
            storages[key], counts[key] = torch.empty(size, dtype=torch.uint8), count
        if storages[key].numel() != size:
            raise _refuse(f"storage {key!r:.40} with two sizes")
        return storages[key]

    _magic, _version, system = (RestrictedUnpickler(source).load() for _ in range(3))
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _refuse("big-endian numbers")
    content = RestrictedUnpickler(source, find_storage).load()
    keys = RestrictedUnpickler(source).load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise _refuse("no list of storages")
    if len(keys) != len(storages) or set(keys) != set(storages):
        raise _refuse("storages that are not there")
    for key in keys:
        if int.from_bytes(source.read(8), "little") != counts[key]:
            raise _refuse(f"storage {key!r:.40} with two sizes")
        view = storages[key].numpy()
        view[:] = np.frombuffer(source.read(view.size), np.uint8)
    return content


# -- any file --------------------------------------------------------------------------------------


def _read_safetensors(file: IO[bytes], num_bytes: int) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file; nothing in such a file can run.

    Layout (https://github.com/huggingface/safetensors): eight bytes with the header's length
    (little endian), the header {name: {"dtype", "shape", "data_offsets": [begin, end]}}, then the
    tensors' bytes, row by row, without holes. `__metadata__` is left out.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > min(num_bytes - 8, MAX_HEADER_BYTES):
        raise _refuse(f"a header of {length:,} bytes")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors, place, num_left = {}, 0, num_bytes - 8 - length
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        dtype, count = _TYPES[kind], math.prod(_whole_numbers(shape))
        is_there = 0 <= begin == place and end <= num_left
        if not is_there or end - begin != count * dtype.itemsize:
            raise _refuse(f"{name:.80}: bytes {begin} to {end} hold no {shape!r:.80} of {kind}")
        # Each in memory of its own, which is aligned.
        flat = torch.empty(end - begin, dtype=torch.uint8)
        flat.numpy()[:] = np.frombuffer(file.read(end - begin), np.uint8)
        tensors[name], place = flat.view(dtype).reshape(shape), end
    if place != num_left:
        raise _refuse(f"{num_left - place:,} bytes that belong to no tensor")
    return {name: tensors[name] for name in header}


def read(path: Path | str) -> Any:
    """Read weights of any kind to the CPU: a pickle, `.safetensors`, or what `torch.save` wrote.

    The content says which kind it is, except for `.safetensors`. What a file has to show that it is
    whole is compared: CRCs of a zip archive, the checksum of our own checkpoints.

    Returns:
        Plain data, tensors and arrays; anything else is a `Placeholder`.
    Raises:
        UserError: If the file is missing or damaged, asks for more memory than it has bytes, or
            holds an object in place of its weights.
    """
    path = Path(path)
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    kind = "pickle of plain data" if path.suffix == ".pkl" else "PyTorch checkpoint"
    with file:
        try:
            num_bytes = file.seek(0, io.SEEK_END)
            file.seek(0)
            start = file.read(len(_LEGACY_MAGIC))
            file.seek(0)
            if path.suffix == ".safetensors":
                kind = ".safetensors file"
                content = _read_safetensors(file, num_bytes)
            elif start.startswith(b"PK"):
                content = _read_zip(file, num_bytes, path)
            elif start == _LEGACY_MAGIC:
                content = _read_legacy(file, num_bytes)
            else:
                content = RestrictedUnpickler(_ExactFile(file, num_bytes)).load()
            _check_extent(content, num_bytes)
        except UserError:
            raise
        except (*_READ_ERRORS, RecursionError) as error:
            raise UserError(f"{path}: not a readable {kind} ({_reason(error)})") from error
    if isinstance(content, Placeholder):
        raise UserError(
            f"{path}: holds a whole object, a {content.qualified_name}, which only its own "
            "program can build; save its weights there: torch.save(model.state_dict(), PATH)"
        )
    if is_ours(content):
        check_sum(content, path)
    return content


def is_ours(content: Any) -> bool:
    """Whether this is a checkpoint of `pretrain`."""
    stated = content.get("format") if isinstance(content, Mapping) else None
    return isinstance(stated, str) and stated == FORMAT


def check_sum(state: Mapping[str, Any], path: Path) -> None:
    """Compare a state with the checksum in it, if there is one; older ones have none.

    Raises:
        UserError: If they differ.
    """
    if "checksum" in state and str(state["checksum"]) != checksum(state):
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
    if not all(isinstance(key, str) and key.isprintable() and len(key) < 500 for key in state):
        raise UserError("its keys are not names of tensors; save the network's state_dict")
    return state


def check_finite(state: Mapping[str, Any], path: Path | str) -> None:
    """Look for NaN and infinity in a state dict.

    Raises:
        UserError: Naming the first tensor that holds one.
    """
    for name, value in state.items():
        tensor = torch.as_tensor(value) if isinstance(value, np.ndarray) else value
        if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{path}: {name} holds NaN or infinity: the training diverged, or the file is "
                "damaged; take an older checkpoint"
            )
