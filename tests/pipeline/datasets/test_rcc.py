"""The Qt resource reader against files written by an independent writer."""

import struct

import pytest
import zstandard

from common.errors import UserError
from pipeline.datasets.packages import read_rcc
from tests.pipeline.datasets.package_fixture import make_rcc

FILES = {
    "gcompris/src/activities/sea/resource/sea1.webp": b"first " * 50,
    "gcompris/src/activities/sea/resource/deep/sea2.webp": b"second",
    "gcompris/src/activities/sea/\u00e9t\u00e9.txt": b"",
}


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("packing", ["plain", "zlib", "zstd"])
def test_reads_all_formats(version, packing):
    assert read_rcc("x.rcc", make_rcc(FILES, version, packing)) == FILES


def test_large_file_survives_zstd_without_a_stored_size():
    content = bytes(range(256)) * 4000
    packer = zstandard.ZstdCompressor(write_content_size=False)
    raw = make_rcc({"a.bin": content}, 3, "zstd", pack=packer.compress)
    assert read_rcc("x.rcc", raw) == {"a.bin": content}


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: b"PNG!" + raw[4:],
        lambda raw: raw[:4] + struct.pack(">I", 9) + raw[8:],
        lambda raw: raw[:60],
        lambda raw: raw[:-5],
        lambda raw: raw[:4] + struct.pack(">4I", 3, 0xFFFFFF, 24, 24) + raw[20:],
    ],
)
@pytest.mark.parametrize("packing", ["plain", "zlib"])
def test_damaged_files_are_refused_by_name(damage, packing):
    raw = make_rcc({"a/b.txt": b"some text " * 30}, 3, packing)
    with pytest.raises(UserError, match=r"odd\.rcc: no readable Qt resource file .*fetch it again"):
        read_rcc("odd.rcc", damage(raw))


def test_a_tree_that_runs_in_circles_ends():
    folder = struct.pack(">IHII", 0, 2, 1, 0)  # its only entry is itself
    raw = b"qres" + struct.pack(">4I", 1, 20, 20 + len(folder), 20 + len(folder)) + folder
    raw += struct.pack(">HI", 1, 0) + "a".encode("utf-16-be")
    with pytest.raises(UserError, match="circles"):
        read_rcc("x.rcc", raw)
