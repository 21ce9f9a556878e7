"""A set on disk: its options and description; made whole or not at all, by one run at a time.

Some pictures come from Debian packages: fetched and unpacked, never installed. `apt-get download`
checks their hashes, `dpkg-deb` unpacks them.
"""

import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from common.errors import UserError, require
from common.files import held, read_json, read_record_or_none, write_json


def _fetch(names: Sequence[str], cache: Path, size: str) -> None:
    """Download packages into a cache; `size`: how much all of them are, for people.

    Raises:
        UserError: If apt-get is absent or fails.
    """
    by_hand = "fetch the packages on a Debian or Ubuntu machine and give their folder"
    if shutil.which("apt-get") is None:
        raise UserError(f"apt-get is not on this system: {by_hand}, or use the procedural set")
    cache.mkdir(parents=True, exist_ok=True)
    print(f"fetching {', '.join(names)} ({size}) into {cache}", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = ["apt-get", "download", "-q", *names]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(
                f"apt-get download {' '.join(names)} failed ({done.stderr.strip()}); "
                f"run `apt-get update` as root and try again, or {by_hand}"
            )
        for path in Path(folder).glob("*.deb"):
            os.replace(path, cache / path.name)


def newest_package(folder: Path, name: str) -> Path | None:
    """Return a package's .deb in a folder, the youngest if there are several."""
    return max(folder.glob(f"{name}_*.deb"), key=lambda p: p.stat().st_mtime, default=None)


@contextmanager
def unpacked(package: Path, cache: Path) -> Iterator[Path]:
    """The folder that a package was unpacked to; a .deb is unpacked to a temporary one in `cache`.

    Raises:
        UserError: If the .deb is damaged, or there is no dpkg-deb.
    """
    if package.is_dir():
        yield package
        return
    if shutil.which("dpkg-deb") is None:
        raise UserError(f"{package}: dpkg-deb is not on this system; unpack the .deb files into "
                        "one folder and give that")  # fmt: skip
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = ["dpkg-deb", "--extract", str(package), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(
                f"{package}: damaged package ({done.stderr.strip()}); delete it and fetch it again"
            )
        yield Path(folder)


def packages_in(
    names: Sequence[str], packages_dir: Path | None, cache: Path, size: str
) -> list[Path]:
    """Packages in a folder of the user's, else in the cache, where missing ones are fetched first.

    Args:
        names: Of the packages.
        packages_dir: Folder with the .deb files, or with their unpacked `usr` folder; None: cache.
        cache: Folder for what is fetched.
        size: How much all of them are, for people.
    Returns:
        .deb files in the order of `names`, or the folder that they are unpacked in.
    Raises:
        UserError: If packages cannot be had.
    """
    if packages_dir is not None and (packages_dir / "usr/share").is_dir():
        return [packages_dir]
    folder = packages_dir or cache
    missing = [name for name in names if newest_package(folder, name) is None]
    if packages_dir is None and missing:
        _fetch(missing, cache, size)
    require(
        packages_dir is None or not missing,
        f"--packages-dir {packages_dir}: {len(missing)} of {len(names)} packages are missing "
        f"({', '.join([*missing[:4], *['..'][: len(missing) > 4]])}); fetch them with "
        f"`apt-get download {' '.join(missing)}`",
    )
    return [path for name in names if (path := newest_package(folder, name))]


def unpack_library(
    sources: Sequence[Path], cache: Path, key: str, copy: Callable[[Path, Path], None]
) -> tuple[Path, dict[str, str]]:
    """The files taken out of some packages, in a folder of the cache that appears when complete.

    Args:
        sources: See `packages_in`.
        cache: Holds the folder.
        key: What else decides its content.
        copy: Copies what is needed from an unpacked package to the folder.
    Returns:
        The folder; package -> version.
    Raises:
        UserError: If a package is damaged.
    """
    parts = [key, *(f"{path.name} {path.stat().st_size}" for path in sources)]
    name = hashlib.blake2b("\n".join(parts).encode(), digest_size=6).hexdigest()
    root = cache / f"library-{name}"
    if not (root / "library.json").exists():
        print(f"unpacking {len(sources)} packages, once", flush=True)
        partial, versions = root.with_name(f"{root.name}.partial-{os.getpid()}"), {}
        try:
            for source in sources:
                with unpacked(source, cache) as package:
                    copy(package, partial)
                # A .deb is called NAME_VERSION_ARCHITECTURE.deb.
                label = source.name if source.is_file() else "all_unpacked_"
                package_name, version, _ = label.split("_")
                versions[package_name] = version.replace("%3a", ":")
            write_json(partial / "library.json", {"packages": versions})
            if not root.exists():
                partial.rename(root)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return root, read_json(root / "library.json")["packages"]


FORMAT = "fa-dataset-1"
LOCK_WAIT_SECONDS = 5.0  # the workers of a killed run hold its lock until they notice


@dataclass(frozen=True)
class Card:
    """What dataset.json says of every set.

    Attributes:
        name: Name of the set.
        kind: The generator, "voc" or "import".
        options: Everything that determines the pictures.
        licence: Terms of the pictures.
        notes: Honest limits.
    """

    name: str
    kind: str
    options: dict[str, object]
    licence: str
    notes: str

    def write(self, root: Path, **content: object) -> None:
        """Write dataset.json; `content` are classes, lists and counts."""
        head = {"format": FORMAT, "name": self.name, "kind": self.kind}
        tail = {"options": self.options, "licence": self.licence, "notes": self.notes}
        write_json(root / "dataset.json", head | content | tail)


def make_set(card: Card, out: Path, overwrite: bool, fill: Callable[[Path], None]) -> bool:
    """Make a set in a folder of its own, which gets its name when it is complete.

    Args:
        card: Its options decide whether `out` holds this very set.
        out: Folder to make; while unfinished it is called `out`.partial.
        overwrite: Whether a set made with other options is replaced.
        fill: Writes everything below a folder.
    Returns:
        False if the set was there already and was kept.
    Raises:
        UserError: If `out` holds something else, or another run is writing it.
        OSError: If the disk does not take it.
    """
    unfinished, lock = (out.with_name(out.name + ending) for ending in (".partial", ".lock"))
    out.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    with held(lock, patience=LOCK_WAIT_SECONDS, of_process=False):
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            if _is_finished(card, out, overwrite):
                return False
            fill(unfinished)
            if out.exists():
                shutil.rmtree(out)
            unfinished.rename(out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return True


def _is_finished(card: Card, out: Path, overwrite: bool) -> bool:
    """Whether `out` holds this very set; refuse to touch anything else.

    Raises:
        UserError: If `out` is in the way.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    old = read_record_or_none(out / "dataset.json", {"format": str, "options": dict})
    if old is None or old["format"] != FORMAT:
        raise UserError(
            f"{out}: is there, and its dataset.json is missing, damaged or not of this tool; give "
            "another folder"
        )
    there = {"kind": old.get("kind"), **old["options"]}
    requested = {"kind": card.kind, **card.options}
    if overwrite or there == requested:
        return not overwrite
    names = sorted(name for name in {*there, *requested} if there.get(name) != requested.get(name))
    differing = [f"{x}: {there.get(x)} there, {requested.get(x)} requested" for x in names]
    raise UserError(
        f"{out}: holds a set made with other options ({', '.join(differing[:4])}); give another "
        "folder, or --overwrite to replace it"
    )


# -- options of all generated sets ----------------------------------------------------------------


def _option(
    default: float, text: str, least: float = 0, most: float = math.inf, flag: str = ""
) -> Any:
    """A field with the help text, the limits and, where it has another name, its option."""
    more = {"help": text, "least": least, "most": most, "flag": flag}
    return field(default=default, metadata=more)


@dataclass(frozen=True)
class SetOptions:
    """Sizes and statistics of a set; every value changes the pictures.

    Sizes of objects are shares of a picture's shorter side, drawn log-uniformly. A probe picture
    always shows one object. Half of the pictures stand upright.
    """

    num_pool: int = _option(4000, "unlabelled pictures for pretraining")
    num_train: int = _option(300, "labelled pictures for fine-tuning", 1)
    num_test: int = _option(300, "labelled pictures for the evaluation", 1)
    num_probe_train: int = _option(500, "single-object pictures, kNN reference")
    num_probe_val: int = _option(250, "single-object pictures, kNN queries")
    short_side: int = _option(160, "", 32, flag="--image-size")
    long_side: int = _option(200, "", 0, 8192, "--image-size (long side)")
    seed: int = _option(0, "seed of everything random")
    min_object: float = _option(0.25, "smallest object, share of the short side", 0.05)
    max_object: float = _option(0.8, "largest object, share of the short side", 0, 2.0)
    min_objects: int = _option(1, "fewest in a labelled picture", 1, flag="--min-objects-per-image")
    max_objects: int = _option(3, "most in a labelled picture", 0, 20, "--max-objects-per-image")
    pool_min_object: float = _option(0.5, "as --min-object, for pool and probe", 0.05)
    pool_max_object: float = _option(0.95, "as --max-object, for pool and probe", 0, 2.0)
    pool_min_objects: int = _option(1, "fewest in the pool", flag="--pool-min-objects-per-image")
    pool_max_objects: int = _option(2, "most in the pool", 0, 20, "--pool-max-objects-per-image")
    clutter: float = _option(1.0, "amount of distractors, 0 is none")
    quality: int = _option(92, "of the JPEGs, 1..100", 1, 100)

    def __post_init__(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UserError: Naming the option, its value and the remedy.
        """
        flags = {option.name: flag(option) for option in fields(self)}
        for option in fields(self):
            value, name, limits = getattr(self, option.name), flags[option.name], option.metadata
            least, most = limits["least"], limits["most"]
            require(value >= least, f"{name} is {value}: give {least} or more")
            require(value <= most, f"{name} is {value}: give {most} or less")
        for low in ("short_side", *(name for name in flags if "min_" in name)):
            high = low.replace("short", "long").replace("min_", "max_")
            smallest, largest = getattr(self, low), getattr(self, high)
            require(
                smallest <= largest,
                f"{flags[low]} is {smallest}, more than {flags[high]} {largest}: "
                "give a range from small to large",
            )

    def counts(self) -> dict[str, int]:
        """Return the number of pictures of each part of the set."""
        parts = ("pool", "train", "test", "probe/train", "probe/val")
        return {part: getattr(self, f"num_{part.replace('/', '_')}") for part in parts}


def flag(option: Any) -> str:
    """The command line option of a field of `SetOptions`."""
    return option.metadata["flag"] or "--" + option.name.replace("_", "-")
