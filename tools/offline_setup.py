"""Set up an unpacked bundle on a machine without network; only the standard library is used.

Checks every file against MANIFEST.sha256, makes code/.venv that sees the packages of the Python it
is run with, and installs the bundle's wheels there. Nothing outside the bundle is written.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLE = """\
example (in the unpacked bundle; run.sh does it by itself):
  python3 code/tools/offline_setup.py

Exit status: 0 ready; 1 something went wrong or is missing; 2 wrong arguments, or no bundle here.
"""
MANIFEST = "MANIFEST.sha256"
_OPENCV = ("opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
# Run by the new environment: requirements that do not hold there, one a line.
_CHECK = """
import importlib, importlib.metadata, json, sys
try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
words, others = json.load(sys.stdin)
def version(name):
    for candidate in (name, *(others if name == "opencv-python" else ())):
        try:
            return importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            pass
    try:
        return importlib.import_module({"opencv-python": "cv2"}.get(name, name)).__version__
    except (ImportError, AttributeError):
        return None
for word in words:
    wanted = Requirement(word)
    found = version(wanted.name)
    if found is None:
        print(f"{word}: not there")
    elif not wanted.specifier.contains(found, prereleases=True):
        print(f"{word}: {found} is there")
"""


class SetupError(RuntimeError):
    """What stands in the way, and the remedy."""


def bundle_folder() -> Path:
    """The bundle that this file lies in, as BUNDLE/code/tools/offline_setup.py."""
    return Path(__file__).resolve().parents[2]


def read_description(bundle: Path) -> dict[str, Any]:
    """bundle.json.

    Raises:
        FileNotFoundError: If this is no bundle.
    """
    return json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as lower-case hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_files(bundle: Path) -> int:
    """Compare the bundle with its manifest; returns the number of files.

    Raises:
        SetupError: Naming the first few files that are missing or different.
    """
    wrong = []
    lines = (bundle / MANIFEST).read_text(encoding="utf-8").splitlines()
    for line in lines:
        digest, name = line.split("  ", 1)
        path = bundle / name
        if not path.is_file() or sha256_of(path) != digest:
            wrong.append(name)
    if wrong:
        raise SetupError(
            f"{len(wrong)} of {len(lines)} files are missing or differ from {MANIFEST}, first "
            f"{', '.join(wrong[:3])}; copy and unpack the bundle again"
        )
    return len(lines)


def check_machine(description: dict[str, Any]) -> None:
    """Refuse a Python or a processor that the wheels were not chosen for.

    Raises:
        SetupError: With what is here and what the bundle is for.
    """
    wanted = (description["python"], description["machine"])
    found = (".".join(platform.python_version_tuple()[:2]), platform.machine())
    if found != wanted:
        raise SetupError(
            f"the bundle is for Python {wanted[0]} on {wanted[1]}, this is Python {found[0]} on "
            f"{found[1]}: name another interpreter (PYTHON=python{wanted[0]} bash run.sh), or "
            f"pack again with --python {found[0]} --machine {found[1]}"
        )


def make_environment(folder: Path) -> Path:
    """A virtual environment that sees the packages of this Python; returns its site-packages."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.EnvBuilder(system_site_packages=True, with_pip=False, symlinks=True).create(folder)
    inner = sysconfig.get_path("purelib", "venv", {"base": str(folder)})
    if sys.prefix != sys.base_prefix:  # an environment itself: venv passes on its base alone
        outer = "\n".join(site.getsitepackages())
        Path(inner, "packages_of_the_outer_environment.pth").write_text(f"{outer}\n")
    return Path(inner)


def install(bundle: Path, packages: Path) -> None:
    """Install the wheels, and nothing else, into a folder of packages.

    Raises:
        SetupError: If pip is missing or refuses.
    """
    wheels = bundle / "wheels"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
               "--no-input", "--no-index", "--no-deps", "--require-hashes", "--upgrade",
               "--find-links", str(wheels), "--target", str(packages),
               "--requirement", str(wheels / "requirements.txt")]  # fmt: skip
    # pip's own settings of the machine may name other places for packages.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False,
        env=environment | {"PIP_CONFIG_FILE": os.devnull},
    )  # fmt: skip
    if done.returncode:
        raise SetupError(
            f"pip could not install the wheels (no pip here? apt-get install python3-pip):\n"
            f"{done.stderr.strip()}"
        )


def check_requirements(python: Path, requirements: Sequence[str]) -> None:
    """See that the new environment has what the project asks for, the machine's part included.

    Raises:
        SetupError: Naming what is missing or too old.
    """
    done = subprocess.run(
        [str(python), "-c", _CHECK], input=json.dumps([list(requirements), _OPENCV]),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SetupError(f"the new environment does not work:\n{done.stderr.strip()}")
    problems = done.stdout.strip().splitlines()
    if problems:
        raise SetupError(
            f"this machine lacks what it was said to bring: {'; '.join(problems)}. Install it, or "
            "pack again with --has and only the names of what is there"
        )


def stamp(code: Path) -> str:
    """What tools/setup.sh compares: then it takes the environment for complete."""
    data = b"".join((code / name).read_bytes() for name in ("requirements.lock",
                                                          "tools/purepy_wheel.py"))  # fmt: skip
    return subprocess.run(["cksum"], input=data, capture_output=True, check=True).stdout.decode()


def set_up(bundle: Path) -> None:
    """All steps.

    Raises:
        SetupError: If one fails.
    """
    description = read_description(bundle)
    check_machine(description)
    num_files = check_files(bundle)
    print(f"{num_files} files are as they were packed", flush=True)
    environment = bundle / "code/.venv"
    packages = make_environment(environment)
    install(bundle, packages)
    (packages / "this_project.pth").write_text(f"{bundle / 'code'}\n")
    check_requirements(environment / "bin/python", description["requirements"])
    doctor = [str(environment / "bin/python"), str(bundle / "code/tools/doctor.py")]
    if subprocess.run(doctor, cwd=bundle / "code", check=False).returncode:
        raise SetupError("the doctor found something missing (see above)")
    (environment / "setup.stamp").write_text(stamp(bundle / "code"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(arguments)
    bundle = bundle_folder()
    try:
        set_up(bundle)
    except FileNotFoundError as error:
        print(f"error: {error.filename}: not there; this runs in an unpacked bundle, which "
              "tools/bundle.sh makes", file=sys.stderr)  # fmt: skip
        return 2
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
