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
import base64
import csv
import hashlib
import importlib.metadata
import importlib.util
import io
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

SOURCE_REQUIREMENT = "sal-detectron2==0.7.2"
SOURCE_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
COMMIT = "a59f0563"
VERSION = f"0.6+{COMMIT}.purepy"
DIST_INFO = f"detectron2-{VERSION}.dist-info"
WHEEL_NAME = f"detectron2-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "a287fe29b704aef42cdc936f45bcfcb6558469ab1f38f814f9b49a61bcaf2136"
MANIFEST = Path(__file__).with_name("detectron2_manifest.sha256")

# What `detectron2.engine`, `.evaluation` and `.checkpoint` import. torch and torchvision stay out:
# they must come from one index together, which requirements.lock sees to.
REQUIRES = (
    "Pillow>=7.1",
    "cloudpickle",
    "fvcore",
    "iopath",
    "matplotlib",
    "numpy",
    "omegaconf>=2.1",
    "packaging",
    "pycocotools>=2.0.2",
    "setuptools",
    "tabulate",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
)

NOTICE = f"""Detectron2, repacked as pure Python
===================================
Origin:   https://github.com/facebookresearch/detectron2, commit {COMMIT} (2024-04-17)
          Copyright Facebook, Inc. and its affiliates
Licence:  Apache License 2.0 (the file LICENSE beside this one)
Taken from the Python package {SOURCE_REQUIREMENT}
          (wheel with SHA-256 {SOURCE_SHA256}).
Changed:  the compiled library detectron2/_C, the folder detectron2/projects and the scripts in
          tools/ were left out; the package metadata was written anew. No Python file was edited.
"""


class InstallError(ValueError):
    """Something the user can act on: what happened, where, and the remedy."""


def sha256_of(data: bytes) -> str:
    """SHA-256 of `data` as lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def require_sha256(path: Path, expected: str, what: str) -> None:
    """Check one file against its pinned hash.

    Args:
        path: The file to read.
        expected: Hex digest it must have.
        what: Name of the file for the message.

    Raises:
        InstallError: If the file differs.
    """
    found = sha256_of(path.read_bytes())
    if found != expected:
        raise InstallError(
            f"{what} {path.name} has SHA-256 {found}, expected {expected}; delete it and run "
            "again, and do not install it if the difference stays"
        )


def is_kept(name: str) -> bool:
    """Whether a member of the source wheel goes into the pure-Python wheel."""
    return (
        name.startswith("detectron2/")
        and name.endswith((".py", ".yaml"))
        and not name.startswith("detectron2/projects/")
    )


def metadata_text() -> str:
    """The METADATA file of the new distribution."""
    head = [
        "Metadata-Version: 2.1",
        "Name: detectron2",
        f"Version: {VERSION}",
        "Summary: Detectron2 repacked without compiled operators",
        "Home-page: https://github.com/facebookresearch/detectron2",
        "License: Apache-2.0",
        "Requires-Python: >=3.8",
    ]
    return "\n".join(head + [f"Requires-Dist: {item}" for item in REQUIRES]) + "\n"


def read_members(source: Path) -> dict[str, bytes]:
    """Every file of the new wheel except RECORD.

    Args:
        source: The downloaded wheel.

    Returns:
        Archive name to content.

    Raises:
        InstallError: If the archive is damaged or lacks the package or its licence.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            names = archive.namelist()
            members = {name: archive.read(name) for name in names if is_kept(name)}
            licences = [name for name in names if name.endswith(".dist-info/LICENSE")]
            licence = archive.read(licences[0]) if licences else b""
    except zipfile.BadZipFile as error:
        raise InstallError(f"{source} is not a wheel ({error}); delete it and run again") from error
    if "detectron2/__init__.py" not in members or not licence:
        raise InstallError(
            f"{source} holds no detectron2 package with a LICENSE; is it the right wheel?"
        )
    wheel = "Wheel-Version: 1.0\nGenerator: install_detectron2\nRoot-Is-Purelib: true\n"
    wheel += "Tag: py3-none-any\n"
    members[f"{DIST_INFO}/LICENSE"] = licence
    members[f"{DIST_INFO}/NOTICE"] = NOTICE.encode()
    members[f"{DIST_INFO}/METADATA"] = metadata_text().encode()
    members[f"{DIST_INFO}/WHEEL"] = wheel.encode()
    members[f"{DIST_INFO}/top_level.txt"] = b"detectron2\n"
    return members


def record_text(members: Mapping[str, bytes]) -> str:
    """The wheel's RECORD: name, urlsafe base64 SHA-256 without padding, size in bytes."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for name in sorted(members):
        digest = (
            base64.urlsafe_b64encode(hashlib.sha256(members[name]).digest()).rstrip(b"=").decode()
        )
        writer.writerow([name, f"sha256={digest}", len(members[name])])
    writer.writerow([f"{DIST_INFO}/RECORD", "", ""])
    return out.getvalue()


def write_wheel(members: Mapping[str, bytes], out: Path) -> None:
    """Write a wheel whose bytes depend on `members` alone.

    Sorted names, one fixed time stamp, fixed permissions, and no compression: the output of zlib
    differs between its versions, stored bytes do not.

    Args:
        members: Archive name to content, without RECORD.
        out: File to write; appears under its name only when complete.
    """
    partial = out.with_name(out.name + ".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        record = {f"{DIST_INFO}/RECORD": record_text(members).encode()}
        for name, data in [*sorted(members.items()), *record.items()]:
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # Unix, also when written elsewhere
            info.external_attr = 0o100644 << 16
            archive.writestr(info, data)
    partial.replace(out)


def manifest_text(members: Mapping[str, bytes]) -> str:
    """Hashes of the package's own files, in the format of `sha256sum`."""
    return "".join(
        f"{sha256_of(data)}  {name}\n"
        for name, data in sorted(members.items())
        if name.startswith("detectron2/")
    )


def read_manifest(path: Path = MANIFEST) -> dict[str, str]:
    """File name to SHA-256, as recorded in the repository."""
    rows = (line.split("  ", 1) for line in path.read_text().splitlines())
    return {name: digest for digest, name in rows}


def check_members(members: Mapping[str, bytes], manifest: Mapping[str, str]) -> None:
    """Compare the package's files with the recorded hashes.

    Raises:
        InstallError: Naming the first few files that are missing, unexpected or different.
    """
    found = {
        name: sha256_of(data) for name, data in members.items() if name.startswith("detectron2/")
    }
    wrong = sorted(
        name for name in found.keys() | manifest.keys() if found.get(name) != manifest.get(name)
    )
    if wrong:
        raise InstallError(
            f"{len(wrong)} files differ from {MANIFEST.name}, first {', '.join(wrong[:3])}; "
            "the downloaded wheel is not the pinned one"
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
