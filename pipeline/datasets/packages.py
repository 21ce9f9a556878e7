"""Debian packages as sources of pictures: fetched and unpacked, never installed.

`apt-get download` checks their hashes, `dpkg-deb` unpacks them.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError


def fetched(names: Sequence[str], cache: Path, size: str) -> list[Path]:
    """The .deb files of packages in a cache; what is missing there is fetched first.

    Args:
        names: Of the packages.
        cache: Folder for the .deb files.
        size: How much all of them are, for people.
    Raises:
        UserError: If apt-get is absent or fails.
    """
    missing = [name for name in names if newest(cache, name) is None]
    if missing:
        by_hand = "fetch the packages on a Debian or Ubuntu machine and give their folder"
        if shutil.which("apt-get") is None:
            raise UserError(f"apt-get is not on this system: {by_hand}, or use the procedural set")
        cache.mkdir(parents=True, exist_ok=True)
        print(f"fetching {', '.join(missing)} ({size}) into {cache}", flush=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = ["apt-get", "download", "-q", *missing]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(
                    f"apt-get download {' '.join(missing)} failed ({done.stderr.strip()}); "
                    f"run `apt-get update` as root and try again, or {by_hand}"
                )
            for path in Path(folder).glob("*.deb"):
                os.replace(path, cache / path.name)
    return [path for name in names if (path := newest(cache, name))]


def newest(folder: Path, name: str) -> Path | None:
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
