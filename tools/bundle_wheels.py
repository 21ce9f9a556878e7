"""Which wheels an offline machine lacks, and how they are fetched.

Names come from the project's requirements, less what the machine is said to bring; versions and
hashes come from requirements.lock.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.flow.errors import StageError, UserError

PROJECT = "feature-augmented-pretraining"
HAS = ("torch", "torchvision", "numpy", "opencv-python", "matplotlib", "tensorboard")
MACHINES = ("x86_64", "aarch64")
# Published as sources only; both are pure Python, so that a wheel built here fits everywhere.
SOURCES_ONLY = ("fvcore", "iopath")
_GLIBC = ("2_28", "2_27", "2_26", "2_24", "2_17", "2_12", "2_5")
# Reads archives among Debian's photographs, which are fetched over the network anyway; 5.6 MB.
LEFT_OUT = ("zstandard",)
_SPEC = re.compile(
    r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)\s*(?:;\s*(?P<marker>[^\\]*))?"
)
_HASH = re.compile(r"--hash=(sha256:[0-9a-f]{64})")


@dataclass(frozen=True)
class Target:
    """The offline machine: Linux with glibc 2.28 or newer and CPython.

    Attributes:
        python: Its version of Python, such as "3.12".
        machine: Its processor as `uname -m` names it.
        has: Packages that it brings; what they need in turn is there with them.
    """

    python: str
    machine: str = "x86_64"
    has: tuple[str, ...] = HAS

    def __post_init__(self) -> None:
        if not re.fullmatch(r"3\.(1[1-9]|[2-9]\d)", self.python):
            raise UserError(f"--python {self.python}: give 3.11 or newer as MAJOR.MINOR")
        if self.machine not in MACHINES:
            raise UserError(f"--machine {self.machine}: known are {', '.join(MACHINES)}")

    def markers(self, extra: str = "") -> dict[str, str]:
        """What environment markers are evaluated with."""
        return {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "os_name": "posix",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "platform_machine": self.machine,
            "extra": extra,
        }

    def pip_words(self) -> list[str]:
        """Options of pip that choose wheels for this machine."""
        tag = f"cp{self.python.replace('.', '')}"
        platforms = [f"manylinux_{glibc}_{self.machine}" for glibc in _GLIBC]
        platforms += [f"manylinux2014_{self.machine}", f"linux_{self.machine}"]
        words = ["--python-version", self.python, "--implementation", "cp"]
        for abi in (tag, "abi3", "none"):
            words += ["--abi", abi]
        for platform in platforms:
            words += ["--platform", platform]
        return words


@dataclass(frozen=True)
class Locked:
    """One package of the lock file, as it applies to a target."""

    name: str
    version: str
    hashes: tuple[str, ...] = field(repr=False)

    def line(self, hashes: Sequence[str] | None = None) -> str:
        """A line of a requirements file, with the lock's hashes unless others are given."""
        chosen = self.hashes if hashes is None else hashes
        return " ".join([f"{self.name}=={self.version}", *(f"--hash={h}" for h in chosen)])


def requirements_of(name: str) -> list[str]:
    """What the metadata of an installed package asks for; nothing if it is not installed here."""
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def closure(
    roots: Iterable[str],
    target: Target,
    requires: Callable[[str], list[str]] = requirements_of,
) -> set[str]:
    """Names of packages and of all that they need on the target, extras included.

    Args:
        roots: Requirements such as ``fsspec[http]>=2025.3``.
        target: Whose environment decides on markers.
        requires: Requirements of a package by its name.
    """
    waiting = [Requirement(word) for word in roots]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            below = [Requirement(word) for word in requires(name)]
            waiting += [
                r for r in below if r.marker is None or r.marker.evaluate(target.markers(extra))
            ]
    return {name for name, _ in seen}


def needed(
    target: Target, requires: Callable[[str], list[str]] = requirements_of
) -> tuple[list[str], list[str]]:
    """What is packed, and the requirements of the project that must hold on the target.

    Returns:
        (sorted names of the packages, sorted requirements of the project such as ``torch>=2.8``).
    Raises:
        UserError: If the project is not installed here.
    """
    direct = [Requirement(word) for word in requires(PROJECT)]
    direct = [
        r for r in direct
        if r.name not in LEFT_OUT and (r.marker is None or r.marker.evaluate(target.markers()))
    ]  # fmt: skip
    if not direct:
        raise UserError("this project's own metadata is not there; run bash tools/setup.sh")
    names = closure([str(r) for r in direct], target, requires)
    names -= closure(target.has, target, requires)
    return sorted(names), sorted(f"{canonicalize_name(r.name)}{r.specifier}" for r in direct)


def read_lock(text: str, names: Iterable[str], target: Target) -> list[Locked]:
    """The lock's entries of some packages, by name.

    Raises:
        UserError: If the lock has none that applies to the target.
    """
    found: dict[str, Locked] = {}
    for block in re.split(r"\n(?=[A-Za-z0-9])", text):
        spec = _SPEC.match(block)
        if spec is None:
            continue
        marker = (spec["marker"] or "").strip()
        if not marker or Marker(marker).evaluate(target.markers()):
            name = canonicalize_name(spec["name"])
            found[name] = Locked(name, spec["version"], tuple(_HASH.findall(block)))
    missing = sorted(set(names) - found.keys())
    if missing:
        raise UserError(
            f"requirements.lock pins no {', '.join(missing)} for Python {target.python}; make it "
            "anew (docs/dependencies.md)"
        )
    return [found[name] for name in sorted(names)]


def fetch(locked: Sequence[Locked], target: Target, folder: Path) -> None:
    """Download wheels for the target, hashes checked, and build those that come as sources.

    Raises:
        StageError: If pip cannot; its last words are in the message.
    """
    ready = [package for package in locked if package.name not in SOURCES_ONLY]
    sources = [package for package in locked if package.name in SOURCES_ONLY]
    chosen = ["--only-binary=:all:", *target.pip_words()]
    _pip(["download", *chosen], ready, folder)
    if sources:
        _pip(["wheel", "--no-build-isolation", "--use-pep517"], sources, folder)
    bound = [w.name for w in folder.glob("*.whl") if _is_bound(w.name) and _name(w) in SOURCES_ONLY]
    if bound:
        raise StageError(f"{bound[0]} was built for this machine and may not run on another")


def _is_bound(wheel_name: str) -> bool:
    return not wheel_name.endswith("-none-any.whl")


def _name(wheel: Path) -> str:
    return canonicalize_name(wheel.name.split("-")[0])


def _pip(words: list[str], locked: Sequence[Locked], folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "requirements.txt")
        file.write_text("".join(f"{package.line()}\n" for package in locked))
        command = [sys.executable, "-m", "pip", words[0], "--quiet", "--no-deps",
                   "--disable-pip-version-check", "--no-input", "--require-hashes",
                   *words[1:], "-r", str(file), *_folder_words(words[0], folder)]  # fmt: skip
        # A fixed time in the archives: the same sources give the same wheel.
        environment = os.environ | {"SOURCE_DATE_EPOCH": "315532800"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise StageError(
            f"pip {words[0]}: {' '.join(errors or ['no reason given'])}; no network here, or no "
            "such wheel for the target?"
        )


def _folder_words(verb: str, folder: Path) -> list[str]:
    return ["--dest" if verb == "download" else "--wheel-dir", str(folder)]


def requirement_lines(folder: Path, locked: Sequence[Locked], more: Sequence[str]) -> list[str]:
    """Requirements with the hashes of the very wheels in a folder.

    Args:
        folder: Of the wheels; one for each package.
        locked: Packages of the lock.
        more: Requirements with hashes of wheels that the lock does not know.
    Raises:
        StageError: If a wheel is missing.
    """
    wheels = {_name(path): path for path in folder.glob("*.whl")}
    missing = sorted({package.name for package in locked} - wheels.keys())
    if missing:
        raise StageError(f"pip left no wheel for {', '.join(missing)}")
    lines = []
    for package in locked:
        digest = hashlib.sha256(wheels[package.name].read_bytes()).hexdigest()
        lines.append(package.line([f"sha256:{digest}"]))
    return sorted([*lines, *more])
