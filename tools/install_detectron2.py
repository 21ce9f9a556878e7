#!/usr/bin/env python3
"""Install Detectron2 without a compiler: repack a hash-pinned wheel as pure Python.

Detectron2 has no release of its own on PyPI, and Faster R-CNN on axis-aligned boxes uses none of
its compiled operators (NMS and ROIAlign come from torchvision). So a published build of commit
a59f0563 is downloaded (its SHA-256 is pinned), stripped of its compiled library, and written again
as a pure-Python wheel that is the same file, byte for byte, on every machine (pinned as well).

An importable Detectron2 is left alone: an official build is always preferred.

Example:
    .venv/bin/python tools/install_detectron2.py
    .venv/bin/python tools/install_detectron2.py --wheel-only wheels/

Exit status: 0 installed or already there, 1 it went wrong, 2 wrong arguments or input.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from tools.purepy_wheel import (
    SOURCE_REQUIREMENT,
    SOURCE_SHA256,
    VERSION,
    WHEEL_NAME,
    WHEEL_SHA256,
    InstallError,
    check_members,
    read_manifest,
    read_members,
    require_sha256,
    sha256_of,
    write_wheel,
)


def download(folder: Path) -> Path:
    """Fetch the pinned source wheel with pip (its hash is checked by pip and here).

    Args:
        folder: Where to put it.

    Returns:
        Path of the wheel.

    Raises:
        InstallError: If pip cannot fetch it.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{SOURCE_REQUIREMENT} --hash=sha256:{SOURCE_SHA256}\n")
    # The wheel is tagged for Python 3.10, but only its Python files are used.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--python-version",
        "3.10",
    ]
    command += [
        "--only-binary=:all:",
        "--require-hashes",
        "-r",
        str(requirement),
        "-d",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = done.stderr.strip().splitlines()[-1:] or ["no wheel appeared"]
        raise InstallError(
            f"pip could not download {SOURCE_REQUIREMENT}: {reason[0]}; check the network "
            f"(or a proxy), or make {WHEEL_NAME} elsewhere with --wheel-only and hand it over "
            "with --wheel FILE"
        )
    require_sha256(wheels[0], SOURCE_SHA256, "downloaded wheel")
    return wheels[0]


def build_wheel(folder: Path) -> Path:
    """Download, repack and check; returns the finished wheel in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / WHEEL_NAME
    with tempfile.TemporaryDirectory() as scratch:
        members = read_members(download(Path(scratch)))
    check_members(members, read_manifest())
    write_wheel(members, out)
    require_sha256(out, WHEEL_SHA256, "repacked wheel")
    return out


def installed_version() -> str | None:
    """Version in the metadata of an installed detectron2; None without metadata."""
    try:
        return importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return None


def is_usable() -> bool:
    """Whether an importable Detectron2 should be left alone.

    A foreign one always is. One that this script put there (its version says so, or it lies in
    site-packages without metadata, as a killed pip leaves it) must match the manifest.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:  # without an origin it is a left-over empty folder
        return False
    site_packages = Path(spec.origin).parents[1]
    version = installed_version()
    interrupted = version is None and site_packages == Path(sysconfig.get_path("purelib"))
    if version != VERSION and not interrupted:
        return True
    try:
        return all(
            sha256_of((site_packages / name).read_bytes()) == digest
            for name, digest in read_manifest().items()
        )
    except OSError:
        return False


def install(wheel: Path, force: bool) -> None:
    """Install the wheel into the running interpreter's environment with pip.

    Raises:
        InstallError: If the file is not the pinned one or pip fails.
    """
    require_sha256(wheel, WHEEL_SHA256, "wheel")
    command = [sys.executable, "-m", "pip", "install", "--quiet", str(wheel)]
    if force:  # also over a damaged installation, which pip would take for complete
        command += ["--force-reinstall", "--no-deps"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InstallError(f"pip could not install {wheel.name}:\n{done.stderr.strip()}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--force", action="store_true", help="install even if detectron2 is importable"
    )
    parser.add_argument(
        "--wheel-only", type=Path, metavar="OUT", help="write the wheel to OUT, install nothing"
    )
    parser.add_argument(
        "--wheel", type=Path, metavar="FILE", help="install this repacked wheel, no network"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    arguments = parse_arguments(argv)
    try:
        if arguments.wheel_only:
            print(build_wheel(arguments.wheel_only))
            return 0
        if not arguments.force and is_usable():
            print("detectron2 is there already and is left as it is (--force replaces it)")
            return 0
        if arguments.wheel and not arguments.wheel.is_file():
            print(f"error: --wheel {arguments.wheel}: no such file", file=sys.stderr)
            return 2
        with tempfile.TemporaryDirectory() as scratch:
            force = arguments.force or installed_version() == VERSION
            install(arguments.wheel or build_wheel(Path(scratch)), force)
    except (InstallError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"installed detectron2 {VERSION} (pure Python)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
