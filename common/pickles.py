"""Pickles read without running anything that is written in them, and within bounds.

A pickle may name any importable function and have it called while it is read. Here a name means one
of a few functions of this module, which build plain data and bound their arguments; every other
name becomes an inert placeholder, so a checkpoint that also holds somebody's trainer or config
object still gives up its tensors. What is dangerous about the rest is size: of a length, of what
references multiply, of keys whose comparison is slow.
"""

from __future__ import annotations

import collections
import math
import pickle
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

# Bounds that no checkpoint of a network comes near.
MAX_OPCODES = 1_000_000  # of a pickle; each may take some 300 bytes of memory
MAX_UNKNOWN_NAMES = 2000  # classes; each takes some 2 KB
MAX_RARE_KEYS = 1000  # keys of tables whose hashes a file could choose to be the same
MAX_DEPTH = 100  # of tables in tables
MAX_ITEMS = 4_000_000  # of all tables, each counted as often as it is referred to


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


def refuse(reason: str) -> pickle.UnpicklingError:
    """The error of a pickle, or a file around one, that is not read."""
    return pickle.UnpicklingError(reason)


# -- what the names in a pickle stand for ----------------------------------------------------------


class _Dtype:
    """A numpy dtype of plain numbers or text, for what `numpy.dtype` is called with in pickles."""

    def __init__(self, name: object, _align: object = False, _copy: object = False) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[biufcSU]\d{1,9}", name):
            raise refuse("a dtype of something else than plain numbers or text")
        self.value = np.dtype(name)

    def set_state(self, state: object) -> None:
        """Take the byte order; any other state is refused."""
        size = (-1, self.value.itemsize)
        match state:
            case (3, "<" | ">" | "|" | "=" as order, None, None, None, int(length), int(), 0 | 8):
                if length in size:
                    self.value = self.value.newbyteorder(order)
                    return
        raise refuse("a dtype's state is more than a byte order")


def _as_bytes(data: object) -> bytes:
    """Buffer content; Python 2 pickles, read as latin1, hold text in its place."""
    if isinstance(data, str):
        return data.encode("latin1")
    if isinstance(data, bytes | bytearray):
        return bytes(data)
    raise refuse(f"a buffer of type {type(data).__name__} is not plain data")


def whole_numbers(values: object) -> tuple[int, ...]:
    """A shape, or strides, checked."""
    sizes: tuple[Any, ...] = (None,)
    if isinstance(values, tuple | list) and len(values) <= 32:
        sizes = tuple(values)
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in sizes):
        raise refuse("a shape that is no few whole numbers")
    return sizes


def _new_array(_subtype: object, _shape: object, _typecode: object) -> np.ndarray:
    """What numpy's pickles call first: an empty array; its state follows."""
    return np.ndarray((0,), dtype=np.int8)


def _array_state(data: object, dtype: object, shape: object) -> tuple[bytes, np.dtype, Any]:
    """Bytes, type and shape of an array, which must agree."""
    content, sizes = _as_bytes(data), whole_numbers(shape)
    if not isinstance(dtype, _Dtype):
        raise refuse("an array without a plain dtype")
    if math.prod(sizes) * dtype.value.itemsize != len(content):
        raise refuse(f"{len(content)} bytes hold no {sizes} of {dtype.value}")
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
        raise refuse("a set or table of something else than a list")
    return [item for value in values if isinstance(value, list | tuple) for item in value]


def _bytes(*values: object) -> bytes:
    """`bytes` and `bytearray` take no length, which could be any."""
    if len(values) == 2 and isinstance(values[0], str):
        return _encode(values[0])
    return _as_bytes(values[0]) if values else b""


def _complex(real: float = 0.0, imaginary: float = 0.0) -> complex:
    if not isinstance(real, int | float) or not isinstance(imaginary, int | float):
        raise refuse("a complex number of something else than two numbers")
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
    sizes, strides = whole_numbers(size), whole_numbers(stride)
    (start,) = whole_numbers((offset,))
    if len(sizes) != len(strides) or math.prod(sizes) >= 1 << 62:
        raise refuse(f"a tensor of shape {sizes} with strides {strides}")
    end = start + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) + 1
    if math.prod(sizes) and end > flat.numel():
        raise refuse(f"a tensor of shape {sizes} in a storage of {flat.numel()} elements")
    return torch.as_strided(flat, sizes, strides, start if math.prod(sizes) else 0)


def _parameter(data: Any, *_: object) -> Any:
    """A parameter is its tensor."""
    return data


def _subclass(function: object, _kind: object, args: tuple[Any, ...], _state: object) -> Any:
    """A tensor with attributes, or of a subclass, is its tensor."""
    return function(*args) if function in _REBUILD.values() else Placeholder()  # pyright: ignore


def _size(*sizes: object) -> tuple[int, ...]:
    return whole_numbers(sizes[0] if len(sizes) == 1 else sizes)


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


class ExactFile:
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
            raise refuse(f"a pickle of more than {MAX_OPCODES:,} steps")
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
        self, file: ExactFile, find_storage: Callable[[torch.dtype, str, int], Tensor] | None = None
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
                raise refuse(f"more than {MAX_UNKNOWN_NAMES} unknown classes")
            shown = ascii(f"{module}.{name}"[:200])[1:-1]
            fields = {"qualified_name": shown}
            self._unknown[place] = type("Placeholder", (Placeholder,), fields)
        return self._unknown[place]

    def persistent_load(self, pid: Any) -> Any:
        """A storage of torch's formats."""
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), _, int(count), *rest):
                if self._find_storage is None or count < 0 or any(x is not None for x in rest):
                    raise refuse("a storage where there can be none, or a view of one")
                return _Storage(dtype, self._find_storage(dtype, key, count))
            case ("storage", *_):
                return Placeholder()  # of a kind that is not on the list
            case ("module", kind, *_):  # a class, and beside it its source
                return kind
        raise refuse("a persistent id that torch does not write")

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
                raise refuse(f"a table with a {type(key).__name__} for a key")
            self._num_rare_keys += 1
            if self._num_rare_keys > MAX_RARE_KEYS:
                raise refuse(f"more than {MAX_RARE_KEYS} keys that are tuples or huge numbers")

    def _set(self, *values: object) -> set[Any]:
        items = _items(*values)
        self._keys(items)
        return set(items)

    def _frozenset(self, *values: object) -> frozenset[Any]:
        return frozenset(self._set(*values))

    def _ordered_dict(self, *values: object) -> collections.OrderedDict[Any, Any]:
        pairs = _items(*values)
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise refuse("a table of something else than pairs")
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
                    raise refuse("an array's state is not shape, type and bytes")
        elif not isinstance(owner, Placeholder | collections.OrderedDict):
            raise refuse("state for something that has none")

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
            raise refuse("an object of something that is no class")
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
            raise refuse("items for something that is no table")
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
            raise refuse("items for something that is no list")

    def load_additems(self) -> None:
        """Items of a set."""
        items, target = self.pop_mark(), self.stack[-1]
        if isinstance(target, set):
            target |= self._set(items)
        elif not isinstance(target, Placeholder):
            raise refuse("items for something that is no set")

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


def check_extent(content: Any, num_bytes: int) -> None:
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
                raise refuse("a number of more than 4096 bits")
            if num_items + len(below) > MAX_ITEMS:
                raise refuse(f"tables of more than {MAX_ITEMS:,} items")
        num_items += len(below)
        if num_shown > 8 * num_bytes + (64 << 20):
            raise refuse(f"its tensors claim {num_shown:,} bytes, the file has {num_bytes:,}")
        level = below
        if not level:
            return
    raise refuse(f"tables nested deeper than {MAX_DEPTH}")
