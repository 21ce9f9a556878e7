"""Checkpoints of any program, read without running anything that is written in them.

torch's own readers, `weights_only` too, do not bound what a file may ask for (a `bytearray`, a
deflated record, a storage larger than its record), so the zip archive that `torch.save` writes, and
the format before it, are read here, with the unpickler of `common.pickles`.

Memory and time stay in proportion to the file. Damage is seen by our checkpoints' checksum, and by
the CRCs of the zip archive.
"""

import errno
import hashlib
import io
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, no_such_file
from common.files import open_regular
from common.pickles import (
    ExactFile,
    Placeholder,
    RestrictedUnpickler,
    check_extent,
    refuse,
    whole_numbers,
)

FORMAT = "fa-pretrain-1"  # of our own checkpoints
# Keys under which training scripts keep the network.
WRAPPERS = ("state_dict", "model", "model_state_dict", "blobs")
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Bounds that no checkpoint of a network comes near.
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
        content = RestrictedUnpickler(ExactFile(file, num_bytes)).load()
        check_extent(content, num_bytes)
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
            raise refuse("a zip archive without the data.pkl of torch.save")
        folder = places[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in records:
            raise UserError(
                f"{path}: is a TorchScript program; save the weights instead: "
                "torch.save(torch.jit.load(PATH).state_dict(), OUT)"
            )
        for name, info in records.items():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise refuse(f"record {name!r:.80} is compressed, which torch.save never does")
        claimed = sum(info.file_size for info in archive.infolist())
        if claimed > num_bytes or len(records) < len(archive.infolist()):
            raise refuse("records that lie over each other, or have one name")

        def read_record(name: str) -> Tensor:
            if folder + name not in records:
                raise refuse(f"no record {name!r:.80}")
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
            raise refuse("big-endian numbers")
        storages: dict[str, Tensor] = {}

        def find_storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
            if key not in storages:
                storages[key] = read_record(f"data/{key}")
            if storages[key].numel() != count * dtype.itemsize:
                raise refuse(f"storage {key!r:.40} of {count} elements in another number of bytes")
            return storages[key]

        data = read_record("data.pkl").numpy().tobytes()
        return RestrictedUnpickler(ExactFile(io.BytesIO(data), len(data)), find_storage).load()


def _check_directory(file: IO[bytes], num_bytes: int) -> None:
    """Refuse a directory of records that zipfile would need long and much memory for.

    The archive ends in its end record, and before it, if it is large, in those of zip64 (APPNOTE
    4.3.14 to 4.3.16).
    """
    file.seek(max(0, num_bytes - 98))
    end = file.read().rjust(98, b"\0")
    if end[76:80] != b"PK\5\6" or end[96:] != b"\0\0":
        raise refuse("a zip archive that is cut off")
    size = int.from_bytes(end[88:92], "little")
    if end[56:60] == b"PK\6\7":
        size = int.from_bytes(end[40:48], "little")
    if size > MAX_DIRECTORY_BYTES:
        raise refuse(f"a zip directory of {size:,} bytes")
    file.seek(0)


def _read_legacy(file: IO[bytes], num_bytes: int) -> Any:
    """What `torch.save` wrote before 1.6: four pickles, keys of storages, and their bytes."""
    source = ExactFile(file, num_bytes)
    storages: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def find_storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        size = count * dtype.itemsize
        if key not in storages:
            if size > num_bytes - sum(data.numel() for data in storages.values()):
                raise refuse(f"storages larger than the file, which has {num_bytes:,} bytes")
            storages[key], counts[key] = torch.empty(size, dtype=torch.uint8), count
        if storages[key].numel() != size:
            raise refuse(f"storage {key!r:.40} with two sizes")
        return storages[key]

    _magic, _version, system = (RestrictedUnpickler(source).load() for _ in range(3))
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise refuse("big-endian numbers")
    content = RestrictedUnpickler(source, find_storage).load()
    keys = RestrictedUnpickler(source).load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise refuse("no list of storages")
    if len(keys) != len(storages) or set(keys) != set(storages):
        raise refuse("storages that are not there")
    for key in keys:
        if int.from_bytes(source.read(8), "little") != counts[key]:
            raise refuse(f"storage {key!r:.40} with two sizes")
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
        raise refuse(f"a header of {length:,} bytes")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors, place, num_left = {}, 0, num_bytes - 8 - length
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        dtype, count = _TYPES[kind], math.prod(whole_numbers(shape))
        is_there = 0 <= begin == place and end <= num_left
        if not is_there or end - begin != count * dtype.itemsize:
            raise refuse(f"{name:.80}: bytes {begin} to {end} hold no {shape!r:.80} of {kind}")
        # Each in memory of its own, which is aligned.
        flat = torch.empty(end - begin, dtype=torch.uint8)
        flat.numpy()[:] = np.frombuffer(file.read(end - begin), np.uint8)
        tensors[name], place = flat.view(dtype).reshape(shape), end
    if place != num_left:
        raise refuse(f"{num_left - place:,} bytes that belong to no tensor")
    return {name: tensors[name] for name in header}


def dump_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a `.safetensors` file, in the layout that `_read_safetensors` reads."""
    names, header, parts, end = {kind: name for name, kind in _TYPES.items()}, {}, [], 0
    for name, value in tensors.items():
        plain = value.detach().cpu().contiguous()
        parts.append(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
        begin, end = end, end + len(parts[-1])
        header[name] = {"dtype": names[plain.dtype], "shape": list(plain.shape),
                        "data_offsets": [begin, end]}  # fmt: skip
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


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
        text = no_such_file(path, "give the path of a checkpoint", "file")
        raise UserError(text) from None
    except OSError as error:
        inner = sorted(path.glob("*.pth")) if path.is_dir() else []
        remedy = f"; give {inner[0]}" if inner else ""
        raise UserError(f"{path}: cannot be read ({error.strerror or error}){remedy}") from None
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
                content = RestrictedUnpickler(ExactFile(file, num_bytes)).load()
            check_extent(content, num_bytes)
        except UserError:
            raise
        except (*_READ_ERRORS, RecursionError, OSError) as error:
            # A damaged zip archive makes zipfile seek to a place before the file.
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
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
        flat = plain.as_strided((plain.numel(),), (1,))  # one element may have any stride
        digest.update(flat.view(torch.uint8).numpy())
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


def is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite; the sum tells in a tenth of the time, unless it is."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def check_finite(state: Mapping[str, Any], path: Path | str) -> None:
    """Look for NaN and infinity in a state dict.

    Raises:
        UserError: Naming the first tensor that holds one.
    """
    for name, value in state.items():
        tensor = torch.as_tensor(value) if isinstance(value, np.ndarray) else value
        if isinstance(tensor, Tensor) and not is_finite(tensor):
            raise UserError(
                f"{path}: {name} holds NaN or infinity: the training diverged, or the file is "
                "damaged; take an older checkpoint"
            )
