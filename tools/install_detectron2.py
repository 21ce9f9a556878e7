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

import base64
import csv
import hashlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import RunFailed, UserError, command_parser, run_command
from common.files import sha256_of
from common.provenance import library_version

SOURCE_REQUIREMENT = "sal-detectron2==0.7.2"
SOURCE_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
COMMIT = "a59f0563"
VERSION = f"0.6+{COMMIT}.purepy"
DIST_INFO = f"detectron2-{VERSION}.dist-info"
WHEEL_NAME = f"detectron2-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "a287fe29b704aef42cdc936f45bcfcb6558469ab1f38f814f9b49a61bcaf2136"

# The requirements are what `detectron2.engine`, `.evaluation` and `.checkpoint` import. torch and
# torchvision stay out: they must come from one index together, which requirements.lock sees to.
REQUIRES = (
    "Pillow>=7.1 cloudpickle fvcore iopath matplotlib numpy omegaconf>=2.1 packaging "
    "pycocotools>=2.0.2 setuptools tabulate termcolor>=1.1 tqdm>4.29.0 yacs>=0.1.8"
)
METADATA = f"""Metadata-Version: 2.1
Name: detectron2
Version: {VERSION}
Summary: Detectron2 repacked without compiled operators
Home-page: https://github.com/facebookresearch/detectron2
License: Apache-2.0
Requires-Python: >=3.8
""" + "".join(f"Requires-Dist: {requirement}\n" for requirement in REQUIRES.split())
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
WHEEL = (
    "Wheel-Version: 1.0\nGenerator: install_detectron2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
)


def require_sha256(path: Path, expected: str, what: str) -> None:
    """Check one file against its pinned hash; `what` names the file in the message.

    Raises:
        RunFailed: If the file differs.
    """
    actual = sha256_of(path)
    if actual != expected:
        raise RunFailed(
            f"{what} {path.name} has SHA-256 {actual}, expected {expected}; delete it and run "
            "again, and do not install it if the difference stays"
        )


def is_kept(name: str) -> bool:
    """Whether a member of the source wheel goes into the pure-Python wheel."""
    is_ours = name.startswith("detectron2/") and not name.startswith("detectron2/projects/")
    return is_ours and name.endswith((".py", ".yaml"))


def record_hash(data: bytes) -> str:
    """SHA-256 as a wheel's RECORD has it: urlsafe base64 without padding."""
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def read_members(source: Path) -> dict[str, bytes]:
    """Every file of the new wheel except RECORD: archive name -> content.

    Raises:
        RunFailed: If the downloaded wheel is damaged or lacks the package or its licence.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise RunFailed(f"{source} is not a wheel ({error}); delete it and run again") from error
    members = {name: data for name, data in content.items() if is_kept(name)}
    licences = [data for name, data in content.items() if name.endswith(".dist-info/LICENSE")]
    if "detectron2/__init__.py" not in members or not licences:
        raise RunFailed(
            f"{source} holds no detectron2 package with a LICENSE; is it the right wheel?"
        )
    own = {"NOTICE": NOTICE, "METADATA": METADATA, "WHEEL": WHEEL, "top_level.txt": "detectron2\n"}
    members |= {f"{DIST_INFO}/{name}": text.encode() for name, text in own.items()}
    return members | {f"{DIST_INFO}/LICENSE": licences[0]}


def write_wheel(members: Mapping[str, bytes], out: Path) -> None:
    """Write a wheel whose bytes depend on `members` (without RECORD) alone.

    Sorted names, one fixed time stamp, fixed permissions, and no compression: the output of zlib
    differs between its versions, stored bytes do not. The file appears when it is complete.
    """
    rows = [f"{name},sha256={record_hash(d)},{len(d)}\n" for name, d in sorted(members.items())]
    record = f"{DIST_INFO}/RECORD"
    partial = out.with_name(out.name + ".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        content = "".join([*rows, f"{record},,\n"]).encode()
        for name, data in [*sorted(members.items()), (record, content)]:
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # Unix, also when written elsewhere
            info.external_attr = 0o100644 << 16
            archive.writestr(info, data)
    partial.replace(out)


def pip(*words: str) -> subprocess.CompletedProcess[str]:
    """Run pip of this environment."""
    command = [sys.executable, "-m", "pip", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def build_wheel(folder: Path) -> Path:
    """Download the pinned source wheel, repack and check it; returns the new wheel in `folder`.

    Raises:
        RunFailed: If pip cannot fetch it, or it is not the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / WHEEL_NAME
    with tempfile.TemporaryDirectory() as scratch:
        requirement = Path(scratch, "requirement.txt")
        requirement.write_text(f"{SOURCE_REQUIREMENT} --hash=sha256:{SOURCE_SHA256}\n")
        # The wheel is tagged for Python 3.10, but only its Python files are used.
        options = "--quiet --no-deps --python-version 3.10 --only-binary=:all: --require-hashes"
        done = pip("download", *options.split(), "-r", str(requirement), "-d", scratch)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            reason = done.stderr.strip().splitlines()[-1:] or ["no wheel appeared"]
            raise RunFailed(
                f"pip could not download {SOURCE_REQUIREMENT}: {reason[0]}; check the network "
                f"(or a proxy), or make {WHEEL_NAME} elsewhere with --wheel-only and hand it over "
                "with --wheel FILE"
            )
        require_sha256(wheels[0], SOURCE_SHA256, "downloaded wheel")
        write_wheel(read_members(wheels[0]), out)
    require_sha256(out, WHEEL_SHA256, "repacked wheel")
    return out


def is_usable() -> bool:
    """Whether an importable Detectron2 should be left alone.

    Another build always is. One that this script installed (its version says so) must have the
    files that its RECORD lists. A killed pip leaves a package without metadata in site-packages.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:  # without an origin it is a left-over empty folder
        return False
    version = library_version("detectron2")
    if version is None:
        return Path(spec.origin).parents[1] != Path(sysconfig.get_path("purelib"))
    if version != VERSION:
        return True
    # Read here: since Python 3.12 `importlib.metadata.files` leaves out what is missing.
    package = importlib.metadata.distribution("detectron2")
    rows = csv.reader((package.read_text("RECORD") or "").splitlines())
    hashed = [(row[1].partition("=")[2], row[0]) for row in rows if len(row) == 3 and row[1]]
    try:
        is_whole = all(
            record_hash(Path(str(package.locate_file(name))).read_bytes()) == digest
            for digest, name in hashed
        )
    except OSError:
        return False
    return bool(hashed) and is_whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--force", action="store_true", help="install even if detectron2 is importable")
    add("--wheel-only", type=Path, metavar="OUT", help="write the wheel to OUT, install nothing")
    add("--wheel", type=Path, metavar="FILE", help="install this repacked wheel, no network")
    options = parser.parse_args(arguments)

    def work() -> int:
        if options.wheel_only:
            print(build_wheel(options.wheel_only))
            return 0
        if not options.force and is_usable():
            print("detectron2 is there already and is left as it is (--force replaces it)")
            return 0
        if options.wheel and not options.wheel.is_file():
            raise UserError(f"--wheel {options.wheel}: no such file")
        with tempfile.TemporaryDirectory() as scratch:
            wheel = options.wheel or build_wheel(Path(scratch))
            require_sha256(wheel, WHEEL_SHA256, "wheel")
            # Over a damaged installation pip would do nothing: it takes it for complete.
            replaces = options.force or library_version("detectron2") == VERSION
            more = ["--force-reinstall", "--no-deps"] if replaces else []
            done = pip("install", "--quiet", str(wheel), *more)
            if done.returncode != 0:
                raise RunFailed(f"pip could not install {wheel.name}:\n{done.stderr.strip()}")
        print(f"installed detectron2 {VERSION} (pure Python)")
        return 0

    return run_command(work, when_interrupted="stopped; the same command starts anew")


if __name__ == "__main__":
    sys.exit(main())
