"""Photo composites, made from small stand-ins for the packages; once (slow) from the true ones."""

import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import zstandard

from common.errors import UserError
from pipeline.datasets import photos
from pipeline.datasets.photos import read_rcc
from pipeline.datasets.sets import SetOptions
from tests.pipeline.datasets.package_fixture import (
    COUNTS,
    SIZES,
    make_deb,
    make_packages,
    make_rcc,
    package_files,
    run,
    tree,
    write_tree,
)  # fmt: skip
from tools import make_dataset


@pytest.fixture(scope="module")
def debs(tmp_path_factory) -> Path:
    return make_packages(tmp_path_factory.mktemp("debs"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def library(debs: Path, cache: Path) -> photos.Library:
    return photos.open_library(debs, cache)


def test_the_committed_lists_are_sound():
    cutouts = photos.listed_cutouts()
    files = [f for groups in cutouts.values() for group in groups for f in group]
    assert len(files) == len(set(files)) == 206
    for table in photos.CLASS_SETS.values():
        assert sorted(k for kinds in table.values() for k in kinds) == sorted(cutouts)
    scenes = photos.listed_backgrounds()
    grounds = [f for group in scenes.values() for f in group]
    assert len(grounds) == len(set(grounds)) > 100
    kept_apart = ("erase", "explore_farm_animals", "explore_world_animals")
    assert not any(f.startswith(kept_apart) for f in grounds)


def test_the_library_holds_every_listed_picture(library: photos.Library, cache, tmp_path: Path):
    assert library.num_missing == 0
    assert library.packages == dict.fromkeys(photos.PACKAGES, "1.0-1")
    for folder, count in (("cutouts", 206), ("backgrounds", 114)):
        assert sum(p.is_file() for p in (library.root / folder).rglob("*")) == count
    assert len(list((library.root / "licences").iterdir())) == 3
    assert list(cache.iterdir()) == [library.root]
    # A folder that the packages were unpacked to serves as well.
    for files in package_files().values():
        write_tree(tmp_path / "root", files)
    other = photos.open_library(tmp_path / "root", tmp_path / "cache")
    assert tree(other.root / "cutouts") == tree(library.root / "cutouts")
    assert tree(other.root / "backgrounds") == tree(library.root / "backgrounds")


@pytest.mark.parametrize(
    ("classes", "num", "seed"), [("coarse", 3, 0), ("medium", 5, 1), ("fine", 11, 7)]
)  # fmt: skip
def test_train_and_test_share_no_picture_and_no_near_duplicate(library, classes, num, seed):
    names, seen, unseen = photos.split(library, classes, seed)
    assert len(names) == num
    assert photos.split(library, classes, seed) == (names, seen, unseen)
    assert photos.split(library, classes, seed + 1) != (names, seen, unseen)

    def files(part: photos.Part) -> set[str]:
        return {f for kinds in part.cutouts for kind in kinds for f in kind}

    assert not files(seen) & files(unseen)
    assert len(files(seen)) + len(files(unseen)) == 206
    assert len(files(unseen)) / 206 == pytest.approx(1 / 3, abs=0.04)
    assert not set(seen.backgrounds) & set(unseen.backgrounds)
    assert len(unseen.backgrounds) / 114 == pytest.approx(1 / 4, abs=0.04)
    for groups in [*library.cutouts.values(), library.backgrounds]:
        for group in groups:
            sides = [set(group) & (files(p) | set(p.backgrounds)) for p in (seen, unseen)]
            assert sum(map(bool, sides)) == 1


@pytest.mark.parametrize("part", ["train", "pool", "probe/train", "test", "probe/val"])
def test_each_part_uses_its_own_pictures_only(library, monkeypatch, part):
    names, seen, unseen = photos.split(library, "coarse", 0)
    options = SetOptions(short_side=48, long_side=60)
    source = photos.PhotoSource(options, names, library.root, seen, unseen)
    used: set[str] = set()
    for loader in ("_load_cutout", "_load_background"):
        original = getattr(photos, loader)
        monkeypatch.setattr(photos, loader, lambda r, n, s, f=original: used.add(n) or f(r, n, s))
    scenes = [source.scene(part, i) for i in range(25)]
    own = unseen if part in ("test", "probe/val") else seen
    allowed = {f for kinds in own.cutouts for kind in kinds for f in kind} | set(own.backgrounds)
    assert 0 < len(used & allowed) == len(used)
    assert all(s.image.dtype == np.uint8 and s.objects for s in scenes)
    if part.startswith("probe"):
        assert [s.objects[0].label for s in scenes] == [i % 3 for i in range(25)]


def test_packages_are_fetched_with_apt_get_once_and_the_bytes_are_the_same_for_any_workers(
    debs, library, cache, tmp_path: Path, monkeypatch
):
    tool = tmp_path / "bin" / "apt-get"
    write_tree(tmp_path / "bin", {
        "apt-get": f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n/bin/cp {debs}/*.deb .\n'.encode()
    })  # fmt: skip
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    monkeypatch.setenv("FA_CACHE", str(tmp_path / "cache"))
    assert run("photos", tmp_path / "a" / "set", *SIZES) == 0
    photos.open_library(None, tmp_path / "cache" / "photos")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["download -q " + " ".join(photos.PACKAGES)]
    where = ["--packages-dir", debs, "--cache", cache]
    assert run("photos", tmp_path / "b" / "set", *SIZES, *where, "--num-workers", 2) == 0
    assert tree(tmp_path / "a" / "set") == tree(tmp_path / "b" / "set")
    card = json.loads((tmp_path / "a/set/dataset.json").read_text())
    assert card["classes"] == list(photos.CLASS_SETS["coarse"])
    assert card["options"]["packages"] == dict.fromkeys(photos.PACKAGES, "1.0-1")
    assert "206 cut-outs" in card["notes"]
    assert "GPL-2" in card["licence"]


def test_without_packages_the_remedy_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["photos", tmp_path / "out", *SIZES, "--cache", tmp_path / "cache"]
    assert run(*words) == 2
    assert "apt-get is not on this system" in capsys.readouterr().err
    write_tree(tmp_path, {"apt-get": b'#!/bin/sh\necho "E: no such package" >&2; exit 100'})
    (tmp_path / "apt-get").chmod(0o755)
    assert run(*words) == 2
    assert "E: no such package" in capsys.readouterr().err
    assert not list(tmp_path.glob("cache/*"))
    assert run(*words, "--packages-dir", tmp_path) == 2
    assert "3 of 3 packages are missing (tuxpaint-stamps-default" in capsys.readouterr().err


def test_a_few_missing_pictures_are_counted_many_are_refused(debs, tmp_path: Path):
    few = tmp_path / "few"
    shutil.copytree(debs, few)
    stamps = package_files()["tuxpaint-stamps-default"]
    make_deb(few / "tuxpaint-stamps-default_1.0-1_all.deb", dict(list(stamps.items())[3:]))
    assert photos.open_library(few, tmp_path / "cache").num_missing == 3
    make_deb(few / "tuxpaint-stamps-default_9.9-1_all.deb", {})
    os.utime(few / "tuxpaint-stamps-default_9.9-1_all.deb", (1e11, 1e11))  # the youngest
    with pytest.raises(UserError, match=r"206 of 320 listed pictures.*9\.9-1.*Debian 12"):
        photos.open_library(few, tmp_path / "cache")


@pytest.mark.parametrize("damage", ["truncated", "no archive", "bad resource"])
def test_damaged_packages_are_named(debs, tmp_path: Path, damage):
    folder = tmp_path / "debs"
    shutil.copytree(debs, folder)
    path = next(folder.glob("gcompris-qt-data_*.deb"))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20_000])
    elif damage == "no archive":
        path.write_bytes(b"<html>not found</html>")
    else:
        make_deb(path, {"usr/share/gcompris-qt/rcc/details.rcc": b"qres and no more"})
    match = "details.rcc" if damage == "bad resource" else r"gcompris-qt-data_.*damaged package"
    with pytest.raises(UserError, match=match):
        photos.open_library(folder, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


# -- Qt resource files against an independent writer ----------------------------------------------

RESOURCE = {
    "gcompris/src/activities/sea/resource/sea1.webp": b"first " * 50,
    "gcompris/src/activities/sea/resource/deep/sea2.webp": b"second",
    "gcompris/src/activities/sea/\u00e9t\u00e9.txt": b"",
}


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("packing", ["plain", "zlib", "zstd"])
def test_resource_files_of_all_formats(version, packing, tmp_path: Path):
    file = tmp_path / "x.rcc"
    file.write_bytes(make_rcc(RESOURCE, version, packing))
    assert read_rcc(file) == RESOURCE
    content = bytes(range(256)) * 4000
    packer = zstandard.ZstdCompressor(write_content_size=False)
    file.write_bytes(make_rcc({"a.bin": content}, version, "zstd", pack=packer.compress))
    assert read_rcc(file) == {"a.bin": content}


def test_compressed_resources_are_read_to_their_checksum(tmp_path: Path):
    file = tmp_path / "x.rcc"
    for cut in (4, 12):
        packed = bytes(4) + zlib.compress(b"some text " * 30)[:-cut]
        file.write_bytes(make_rcc({"a.txt": b""}, 3, "zlib", pack=lambda _, data=packed: data))
        with pytest.raises(UserError, match=r"x\.rcc: damaged .*a\.txt is cut short"):
            read_rcc(file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:60],
        # a folder whose only entry is itself
        lambda raw: (b"qres" + struct.pack(">4I", 1, 20, 34, 34) + struct.pack(">IHII", 0, 2, 1, 0)
                     + struct.pack(">HI", 1, 0) + "a".encode("utf-16-be")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packing", ["plain", "zlib"])
def test_damaged_resource_files_are_refused_by_name(damage, packing, tmp_path: Path):
    file = tmp_path / "odd.rcc"
    file.write_bytes(damage(make_rcc({"a/b.txt": b"some text " * 30}, 3, packing)))
    with pytest.raises(UserError, match=r"odd\.rcc: damaged Qt resource file .*fetch it again"):
        read_rcc(file)


# -- cut-outs -------------------------------------------------------------------------------------


def test_cut_outs_keep_their_colour_at_the_edge():
    disc = np.zeros((80, 80, 4), np.uint8)
    cv2.circle(disc, (40, 40), 35, (40, 90, 200, 255), -1)
    rng = np.random.default_rng(0)
    sprite = photos._cut_out(rng, [disc], 60, np.full(3, 128.0))
    inside = sprite.image[sprite.alpha > 0.9].mean(axis=0)
    edge = sprite.image[(sprite.alpha > 0.2) & (sprite.alpha < 0.8)].mean(axis=0)
    assert abs(inside - edge).max() < 12


@pytest.mark.slow
def test_the_true_packages(tmp_path: Path):
    """Needs the packages in the cache, or a Debian system with network."""
    try:
        library = photos.open_library(None, make_dataset.cache_of("photos"))
    except UserError as error:
        if "apt-get" not in str(error):
            raise
        pytest.skip(str(error))
    assert library.num_missing < 5
    assert run("photos", tmp_path / "set", "--classes", "fine", *SIZES) == 0
    pictures = [cv2.imread(str(p)) for p in (tmp_path / "set").rglob("*.jpg")]
    assert len(pictures) == sum(COUNTS.values())
    assert np.mean([p.std() for p in pictures if p is not None]) > 20
