"""Reading weights must never run what a file says."""

import collections
import io
import math
import os
import pickle
import re
import resource
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import checkpoints
from common.errors import UserError
from tests.ranks import Rank, ends_of


class Attack:
    """Creates a file when an ordinary unpickler reads it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


class Settings(dict):
    """Some project's own class, as Lightning checkpoints hold them."""


def weights() -> dict[str, object]:
    return {
        "model": {
            "conv.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
            "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            "count": np.int64(7),
            "empty": np.zeros((0, 3), np.float16),
        },
        "__author__": "someone",
        "order": collections.OrderedDict(a=1),
        "bytes": b"ab\xff",
        "set": {1, 2},
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_weights_survive_every_protocol(protocol: int) -> None:
    loaded = checkpoints.load(io.BytesIO(pickle.dumps(weights(), protocol=protocol)))
    expected = weights()
    model, reference = loaded.pop("model"), expected.pop("model")
    assert loaded == expected
    assert isinstance(reference, dict)
    for name, value in reference.items():
        np.testing.assert_array_equal(model[name], value, strict=True)
    data = pickle.dumps(np.arange(3), protocol=2).replace(b"numpy._core", b"numpy.core")  # numpy 1
    np.testing.assert_array_equal(checkpoints.load(io.BytesIO(data)), np.arange(3))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_functions_in_a_pickle_are_not_called(protocol: int, tmp_path: Path) -> None:
    target = tmp_path / "made"
    data = pickle.dumps({"model": {}, "trap": Attack(target)}, protocol=protocol)
    loaded = checkpoints.load(io.BytesIO(data))
    assert isinstance(loaded["trap"], checkpoints.Placeholder)
    assert not target.exists()
    pickle.loads(data)  # the trap is a real one
    assert target.exists()


@pytest.mark.parametrize(
    "source",
    [
        b"cbuiltins\neval\n(S'1+1'\ntR.",
        b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR.",
        b"c__builtin__\nexec\n(S'x=1'\ntR.",
        b"ctorch.hub\nload\n(S'a'\ntR.",
    ],
)
def test_builtin_doors_are_shut(source: bytes) -> None:
    assert isinstance(checkpoints.load(io.BytesIO(source)), checkpoints.Placeholder)


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps(weights())[:-40], b"\x80\x05K"])
def test_damaged_pickle_names_file_and_remedy(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.pkl: not a readable pickle of plain data"):
        checkpoints.read(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_checkpoint_gives_up_its_tensors(zipped: bool, tmp_path: Path) -> None:
    path, target = tmp_path / "last.ckpt", tmp_path / "made"
    state = collections.OrderedDict(
        weight=torch.arange(6.0).reshape(2, 3).T,
        half=torch.ones(2, dtype=torch.bfloat16),
        parameter=torch.nn.Parameter(torch.ones(3)),
    )
    content = {"state_dict": state, "settings": Settings(a=1), "trap": Attack(target)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    loaded = checkpoints.read(path)
    for name, value in state.items():
        assert torch.equal(loaded["state_dict"][name], value)
    assert isinstance(loaded["settings"], checkpoints.Placeholder)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_damaged_checkpoint_names_file_and_remedy(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(UserError, match=r"model\.pth: not a readable PyTorch checkpoint"):
        checkpoints.read(path)


def test_index_in_a_pickle_cannot_ask_for_memory() -> None:
    """The unpickler in C would make a table of 16 GB for this index."""
    data = pickle.dumps({"model": {}}, protocol=2)
    grown = data.replace(b"q\x00", b"r" + (2**30).to_bytes(4, "little"), 1)
    assert grown != data
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert checkpoints.load(io.BytesIO(grown)) == {"model": {}}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


@pytest.mark.parametrize(
    "name", [b"_codecs\nencode", b"numpy\nndarray", b"collections\nOrderedDict"]
)
def test_state_is_for_objects_only(name: bytes) -> None:
    """BUILD with a pair sets attributes: of a function it could change what later reads do."""
    data = b"c" + name + b"\n(N(S'__defaults__'\n(dttb."
    with pytest.raises(UserError, match="state for something that has none"):
        checkpoints.load(io.BytesIO(data))


def flip_a_byte_of(path: Path, part: bytes) -> None:
    data = bytearray(path.read_bytes())
    place = data.index(part)
    data[place] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_somebody_s_checkpoint_is_seen_by_its_crc(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    values = torch.full((64,), 1.5)
    torch.save({"state_dict": {"conv1.weight": values}}, path)
    assert checkpoints.read(path)["state_dict"]["conv1.weight"][0] == 1.5
    flip_a_byte_of(path, values.numpy().tobytes())
    assert torch.load(path), "torch does not look"
    with pytest.raises(UserError, match=r"weights\.pth: is damaged at .*CRC"):
        checkpoints.read(path)


def test_the_checksum_of_one_element_with_a_stride_is_that_of_its_value() -> None:
    odd = torch.full((9,), 2.0).as_strided((1,), (5,))
    assert checkpoints.checksum({"w": odd}) == checkpoints.checksum({"w": torch.full((1,), 2.0)})


def test_a_flipped_bit_in_our_checkpoint_is_seen_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    state = {"format": checkpoints.FORMAT, "model": {"w": torch.full((64,), 1.5)}}
    state["checksum"] = checkpoints.checksum(state)
    torch.save(state, path, _use_new_zipfile_serialization=False)  # without CRCs
    assert checkpoints.read(path)["format"] == checkpoints.FORMAT
    flip_a_byte_of(path, state["model"]["w"].numpy().tobytes())
    with pytest.raises(UserError, match=r"checkpoint\.pth is damaged .checksum"):
        checkpoints.read(path)


def zipped(pickled: bytes, *records: tuple[str, bytes], compress: int = 0, **more: Any) -> bytes:
    """What torch.save would write, with any pickle and any records."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", compress) as archive:
        warnings.simplefilter("ignore")  # about names that are there twice
        for name, data in (("data.pkl", pickled), ("version", b"3\n"), *records):
            archive.writestr(f"a/{name}", data)
    return out.getvalue()


def storage(key: str, count: int, kind: bytes = b"FloatStorage") -> bytes:
    """The opcodes of a storage."""
    text = f"V{key}\nVcpu\nI{count}\nt".encode()
    return b"(Vstorage\nctorch\n" + kind + b"\n" + text + b"Q"


def tensor(source: bytes, offset: int, size: str, stride: str) -> bytes:
    """The opcodes of a tensor."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + source
        + f"I{offset}\n({size}t({stride}tI00\nNtR".encode()
    )  # fmt: skip


def legacy(pickled: bytes, keys: list[str], data: bytes) -> bytes:
    """What torch.save wrote before 1.6."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    start = b"".join(pickle.dumps(value, protocol=2) for value in head)
    return start + pickled + pickle.dumps(keys, protocol=2) + data


def overlapping(names: list[str], size: int) -> bytes:
    """An archive whose records are all the same bytes."""
    pickled = b"(l" + b"".join(
        tensor(storage(name, size), 0, f"I{size}\n", "I1\n") + b"a" for name in names
    )
    out = io.BytesIO(zipped(pickled + b".", *((f"data/{name}", b"") for name in names[1:]),
                            (f"data/{names[0]}", bytes(4 * size))))  # fmt: skip
    archive = zipfile.ZipFile(out, "a")
    whole = archive.getinfo(f"a/data/{names[0]}")
    for name in names[1:]:
        info = archive.getinfo(f"a/data/{name}")
        info.file_size = info.compress_size = whole.file_size
        info.CRC, info.header_offset = whole.CRC, whole.header_offset
    archive.comment, archive.comment = b"x", b""  # so that the directory is written again
    archive.close()
    return out.getvalue()


def array(dtype: str, state: str, shape: str = "I1\n", data: bytes = b"C\x04AAAA") -> bytes:
    """A pickle of a numpy array of protocol 5, with a state for its dtype."""
    kind = f"cnumpy\ndtype\n(V{dtype}\nI00\nI01\ntR({state}tb".encode()
    return b"cnumpy._core.numeric\n_frombuffer\n(" + data + kind + f"({shape}tVC\ntR.".encode()


def view(count: int, offset: int, size: str, stride: str, record: bytes = b"1234") -> bytes:
    """An archive with one storage and one view of it."""
    return zipped(tensor(storage("0", count), offset, size, stride) + b".", ("data/0", record))


def old_view(count: int, size: str, keys: list[str], data: bytes) -> bytes:
    """The same before 1.6."""
    source = storage("0", count)[:-2] + b"NtQ"
    return legacy(tensor(source, 0, size, "I1\n") + b".", keys, data)


def repeated(head: bytes, body: bytes, times: int, tail: bytes = b"") -> bytes:
    return head + body * times + tail + b"."


def list_bomb(depth: int, tail: bytes = b"") -> bytes:
    """A list of ten times the list before, and so on."""
    return repeated(b"\x80\x02]q\0", b"(" + 10 * b"h\0" + b"lq\0", depth, tail)


def tuple_bomb(tail: bytes) -> bytes:
    return repeated(b"\x80\x02)q\0", b"h\0h\0\x86q\0", 60, b"q\1" + tail)


def length(number: int, num_bytes: int = 8) -> bytes:
    return number.to_bytes(num_bytes, "little")


def directory(count: int) -> bytes:
    """A zip archive of only a directory."""
    entries = count * (b"PK\1\2" + bytes(24) + length(8, 2) + bytes(16) + b"a/data.p")
    return b"PK" + entries + b"PK\5\6" + bytes(4) + b"\xff" * 4 + length(len(entries), 4) + bytes(6)


MUCH, MANY = 14_600_000_000, "I1000000000\n"
PLAIN = "I3\nV<\nNNNI-1\nI-1\nI0\n"
EMPTY_ARRAY = b"cnumpy._core.multiarray\n_reconstruct\n(NNNtR"
ONE_HASH = (b"\x8a\x0b" + length((2**61 - 1) * n, 11) + b"N" for n in range(1, 60_000))
ONES = ("I1\n", "I1\n")
HOSTILE: dict[str, bytes] = {
    # Arrays that read an address of the file's choosing, or take what they do not have.
    "dtype of objects": array("O8", "I3\nV|\nNNNI-1\nI-1\nI0\n", data=b"C\x08AAAAAAAA"),
    "dtype of records": array("V8", PLAIN, data=b"C\x08AAAAAAAA"),
    "dtype with fields": array("f4", "I3\nV<\nN(Va\nt}I-1\nI-1\nI0\n"),
    "dtype of another size": array("S4", "I3\nV|\nNNNI400000\nI1\nI0\n"),
    "dtype with flags": array("f4", "I3\nV<\nNNNI-1\nI-1\nI63\n"),
    "dtype of a bomb": list_bomb(30, b"q\1cnumpy\ndtype\n(h\1tR"),
    "array larger than its bytes": array("f4", PLAIN, MANY),
    "state larger than its bytes": EMPTY_ARRAY + f"(I1\n({MANY}tcnumpy\ndtype\n(Vf4\ntR".encode()
    + b"I00\nC\x04AAAAtb.",
    "shape beyond 64 bits": array("f4", PLAIN, 2 * "I4294967296\n" + "I0\n", b"C\0"),
    "shape of a bomb": list_bomb(30, b"q\1ctorch\nSize\n(h\1tR"),
    # Plain types that grow.
    "bytearray of a number": b"c__builtin__\nbytearray\n(I%d\ntR." % MUCH,
    "bytes of a number": b"cbuiltins\nbytes\n(I%d\ntR." % MUCH,
    "bytearray opcode": b"\x80\x05\x96" + length(MUCH) + b"a.",
    "bytes opcode": b"\x80\x05\x8e" + length(MUCH) + b"a.",
    "frame": b"\x80\x04\x95" + length(MUCH) + b"N.",
    "list into itself": repeated(
        b"\x80\x02]q\0(K\1K\2e", b"cbuiltins\nslice\n(K\0K\0NtRh\0s", 34
    ),
    "set of a tensor": zipped(
        b"cbuiltins\nset\n(" + tensor(storage("0", 4_000_000), 0, "I4000000\n", "I1\n") + b"tR.",
        ("data/0", bytes(16_000_000)),
    ),
    "number of 20 MB": b"\x8b" + length(20_000_000, 4) + b"\x7f" * 20_000_000 + b".",
    "decimal number": b"I" + b"9" * 3_000_000 + b"\n.",
    # References that multiply, depth, and keys that are slow to compare.
    "list bomb": list_bomb(12),
    "list bomb in our format": list_bomb(
        12, b"q\1}(Vformat\nVfa-pretrain-1\nVchecksum\nVa\nVx\nh\1u"
    ),
    "text many times": repeated(
        b"\x80\x02X" + length(1_000_000, 4) + b"a" * 1_000_000 + b"q\0(", b"h\0", 100_000, b"l"
    ),
    "key of a deep tuple": repeated(b"\x80\x02)", b"\x85", 200_000, b"q\0}h\0K\1s"),
    "key of a bomb": tuple_bomb(b"}h\1K\1s"),
    "frozen set of a bomb": tuple_bomb(b"(h\1\x91"),
    "keys of one hash": b"\x80\x02}(" + b"".join(ONE_HASH) + b"u.",
    "deep lists": b"\x80\x02]" + b"]" * 100_000 + b"a" * 100_000 + b".",
    "list in itself": b"\x80\x02]q\0h\0a.",
    "many marks and sets": repeated(b"\x80\x04", b"(\x8f", 1_000_000),
    "many classes": b"\x80\x02(" + b"".join(b"ca\n%d\n" % n for n in range(200_000)) + b"l.",
    # Archives and storages.
    "deflated record": zipped(
        tensor(storage("0", 25_000_000), 0, "I25000000\n", "I1\n") + b".",
        ("data/0", bytes(100_000_000)), compress=8,
    ),
    "records over each other": overlapping([str(n) for n in range(300)], 4_000_000),
    "records of one name": zipped(b"N.", ("data/0", b"1234"), ("data/0", b"5678")),
    "names but for their case": zipped(
        tensor(storage("A", 1), 0, *ONES) + b".", ("data/a", b"1234")
    ),
    "storage larger than its record": view(10**9, 0, MANY, "I1\n"),
    "storage of a negative size": view(-1, 0, *ONES),
    "tensor beyond its storage": view(1, 7, *ONES),
    "tensor before its storage": view(1, -9, *ONES),
    "strides backwards": view(2, 1, "I2\n", "I-1\n", bytes(8)),
    "strides of 0": view(1, 0, MANY, "I0\n"),
    "strides of 0, often": zipped(
        b"(" + 5000 * tensor(storage("0", 1), 0, "I1000000\n", "I0\n") + b"l.", ("data/0", b"1234")
    ),
    "directory of a million": directory(1_000_000),
    "program of TorchScript": zipped(b"N.", ("constants.pkl", b"N."), ("code/a.py", b"")),
    "not an archive of torch": zipped(b"N.").replace(b"data.pkl", b"data.txt"),
    "old storage": old_view(10**9, MANY, ["0"], bytes(12)),
    "old storage that is not there": old_view(1, "I1\n", [], bytes(12)),
    "old tensor beyond its storage": old_view(1, MANY, ["0"], length(1) + b"1234"),
    "old keys of a bomb": legacy(b"N." + tuple_bomb(b"(h\1l"), [], b""),
}  # fmt: skip
TWO = b'{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
HUGE = b'{"a":{"dtype":"F32","shape":[' + b"9" * 4000 + b',0],"data_offsets":[0,0]}}'
HEADERS = {
    "header beyond the file": b"{}",
    "header of lists": b"[" + b"[]," * 8_000_000 + b"[]]",
    "shape of huge numbers": HUGE,
    "the same bytes twice": b'{"a":' + TWO + b',"b":' + TWO + b"}",
    "a hole": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
}


def read_all(folder: Path) -> None:
    """Every file, with 1 GiB of memory beyond what Python and torch take."""
    size = next(x for x in open("/proc/self/status") if x.startswith("VmSize"))  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (int(size.split()[1]) * 1024 + (1 << 30),) * 2)
    for path in sorted(folder.iterdir()):
        begin = time.process_time()
        try:
            checkpoints.read(path)
            answer = "read"
        except UserError as error:
            answer = str(error)
        print(f"{path.stem}|{time.process_time() - begin}|{answer}", flush=True)


@pytest.mark.slow
def test_hostile_files_are_refused_in_5_seconds_and_1_gib(tmp_path: Path) -> None:
    for name, content in HOSTILE.items():
        (tmp_path / f"{name}.pth").write_bytes(content)
    for name, header in HEADERS.items():
        content = length(2**40 if "beyond" in name else len(header)) + header + b"abcd"
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    os.mkfifo(tmp_path / "fifo.pth")
    (tmp_path / "device.pth").symlink_to("/dev/zero")
    (tmp_path / "folder.pth").mkdir()
    ((status, printed),) = ends_of([Rank(read_all, (tmp_path,))])
    assert status == 0, printed
    rows = [line.split("|") for line in printed.splitlines()]
    assert len(rows) == len(HOSTILE) + len(HEADERS) + 3
    reasons = {name: answer for name, _, answer in rows}
    assert "is compressed" in reasons["deflated record"]  # before it is read
    assert "over each other" in reasons["records over each other"]
    for name, seconds, answer in rows:
        assert re.search("not a readable|TorchScript|cannot be read", answer), (name, answer)
        assert float(seconds) < 5, name
        assert not re.search("MemoryError|alloc", answer), (name, answer)
        assert len(answer) < 600, name


def test_the_checkpoint_of_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder where a file is expected\)$"):
        checkpoints.read(tmp_path)
    for name in ("checkpoint.pth", "checkpoint_epoch_0010.pth"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"is expected\); give .*/checkpoint\.pth$"):
        checkpoints.read(tmp_path)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, -1.0], True),
        ([60_000.0, 60_000.0], True),  # the sum is none of float16
        ([math.inf, -math.inf], False),
        ([math.nan, 1.0], False),
    ],
)
def test_what_is_finite(values: list[float], expected: bool) -> None:
    assert checkpoints.is_finite(torch.tensor(values, dtype=torch.float16)) is expected
