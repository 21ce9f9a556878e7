"""Repacking Detectron2, the lock file, set-up and the doctor; nothing here needs the network."""

import base64
import csv
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from common.files import sha256_of
from common.provenance import library_version
from tools import doctor
from tools import install_detectron2 as install

ROOT = Path(__file__).parents[2]
LICENCE = b"Apache License 2.0"


@pytest.fixture
def source_wheel(tmp_path: Path) -> Path:
    path = tmp_path / "sal_detectron2-0.7.2-cp310-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("detectron2/utils/env.py", "b = 2\n")
        archive.writestr("detectron2/__init__.py", "a = 1\n")
        archive.writestr("detectron2/model_zoo/configs/Base.yaml", "A: 1\n")
        archive.writestr("detectron2/_C.cpython-310-x86_64-linux-gnu.so", b"\x7fELF")
        archive.writestr("detectron2/projects/deeplab/__init__.py", "c = 3\n")
        archive.writestr("tools/train_net.py", "d = 4\n")
        archive.writestr("sal_detectron2-0.7.2.dist-info/LICENSE", LICENCE)
        archive.writestr("sal_detectron2-0.7.2.dist-info/METADATA", "Requires-Dist: numpy<2\n")
    return path


def test_repacked_wheel_holds_the_package_and_is_the_same_bytes_in_any_order(
    source_wheel: Path, tmp_path: Path
) -> None:
    members = install.read_members(source_wheel)
    first, second = tmp_path / "first.whl", tmp_path / "second.whl"
    install.write_wheel(members, first)
    install.write_wheel(dict(reversed(members.items())), second)
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    assert {name for name in content if name.startswith("detectron2/")} == {
        "detectron2/__init__.py", "detectron2/utils/env.py",
        "detectron2/model_zoo/configs/Base.yaml",
    }  # fmt: skip
    assert content[f"{install.DIST_INFO}/LICENSE"] == LICENCE
    # RECORD lists every file with its hash.
    record = content[f"{install.DIST_INFO}/RECORD"].decode()
    rows = {name: digest for name, digest, _ in csv.reader(io.StringIO(record))}
    assert rows.keys() == content.keys()
    digest = base64.urlsafe_b64encode(hashlib.sha256(LICENCE).digest()).decode().rstrip("=")
    assert rows[f"{install.DIST_INFO}/LICENSE"] == f"sha256={digest}"


def test_pinned_hash_follows_from_the_installed_files(tmp_path: Path) -> None:
    """The constants agree: packing the installed files again gives the pinned wheel."""
    if library_version("detectron2") != install.VERSION:
        pytest.skip("another Detectron2 is installed, which is the user's choice")
    files = importlib.metadata.files("detectron2") or []
    source = tmp_path / "source.whl"
    with zipfile.ZipFile(source, "w") as archive:
        for file in files:
            if install.is_kept(str(file)):
                archive.writestr(str(file), file.read_binary())
            elif file.name == "LICENSE":
                archive.writestr("sal_detectron2-0.7.2.dist-info/LICENSE", file.read_binary())
    install.write_wheel(install.read_members(source), tmp_path / "out.whl")
    install.require_sha256(tmp_path / "out.whl", install.WHEEL_SHA256, "wheel")


def test_only_a_whole_installation_is_used(source_wheel, tmp_path, monkeypatch):
    """The files lie where pip puts them, and where Python looks for packages first."""
    wheel, folder = tmp_path / "out.whl", tmp_path / "site"
    install.write_wheel(install.read_members(source_wheel), wheel)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(folder))
    monkeypatch.delitem(sys.modules, "detectron2", raising=False)
    assert install.is_usable()
    (folder / "detectron2/utils/env.py").write_text("b = 3\n")
    assert not install.is_usable()
    (folder / "detectron2/utils/env.py").unlink()
    assert not install.is_usable()
    # A killed pip leaves a package without metadata; a checkout on PYTHONPATH has none either.
    monkeypatch.setattr(install, "library_version", lambda _: None)
    assert not install.is_usable()
    monkeypatch.setattr(sysconfig, "get_path", lambda _: "elsewhere")
    assert install.is_usable()


@pytest.mark.slow
def test_download_gives_the_pinned_wheel(tmp_path: Path) -> None:
    assert install.main(["--wheel-only", str(tmp_path)]) == 0
    wheel = tmp_path / install.WHEEL_NAME
    assert sha256_of(wheel) == install.WHEEL_SHA256


def test_an_installed_detectron2_stays_and_a_wrong_wheel_is_refused(tmp_path, capsys):
    assert install.main([]) == 0
    assert "left as it is" in capsys.readouterr().out
    wheel = tmp_path / "detectron2.whl"
    assert install.main(["--force", "--wheel", str(wheel)]) == 2
    wheel.write_bytes(b"something else")
    assert install.main(["--force", "--wheel", str(wheel)]) == 1
    assert "expected " + install.WHEEL_SHA256 in capsys.readouterr().err


def test_lock_pins_every_requirement_with_a_hash() -> None:
    text = (ROOT / "requirements.lock").read_text()
    stanzas = re.split(r"\n(?=[a-z0-9])", re.sub(r"(?m)^\s*#.*\n?", "", text).strip())
    for stanza in stanzas:
        assert re.match(r"[a-z0-9.-]+==\S+", stanza), stanza
        assert "--hash=sha256:" in stanza
    assert "://" not in text
    assert "index-url" not in text
    names = {stanza.split("==")[0] for stanza in stanzas}
    wanted = set(re.findall(r'"([A-Za-z0-9-]+)(?:\[\w+\])?>=', (ROOT / "setup.py").read_text()))
    optional = {"gcsfs", "onnx", "onnxruntime", "wandb"}  # extras that the set-up does not install
    assert wanted - optional <= names


def test_setup_returns_at_once_or_starts_anew(tmp_path: Path) -> None:
    """A project with a finished environment; its only Python is /bin/true."""
    project = tmp_path / "with space"
    environment = project / ".venv"
    (environment / "bin").mkdir(parents=True)
    (project / "tools").mkdir()
    inputs = ("requirements.lock", "setup.py", "tools/install_detectron2.py")
    for name in (*inputs, "tools/setup.sh"):
        shutil.copy(ROOT / name, project / name)
    (environment / "bin/python").symlink_to(shutil.which("true") or "/bin/true")
    data = b"".join((project / name).read_bytes() for name in inputs)
    stamp = subprocess.run(["cksum"], input=data, capture_output=True, check=True).stdout
    (environment / "setup.stamp").write_bytes(stamp)

    def call(*words: str) -> tuple[int, str]:
        command = ["bash", str(project / "tools/setup.sh"), *words]
        variables = os.environ | {"PYTHON": "no-such-python"}
        done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60)
        return done.returncode, done.stdout + done.stderr

    assert call("--quiet") == (0, "")
    # A process that lives is waited for; one that was cut short has left a half-made environment.
    (environment / "setup.running").write_text(f"{os.getpid()}\n")
    status, printed = call()
    assert (status, f"process {os.getpid()} is setting up" in printed) == (1, True)
    (environment / "setup.running").write_text("")
    status, printed = call()
    assert (status, "cut short" in printed) == (1, True)  # there is no interpreter to go on with
    assert not environment.exists()


def test_offline_wheels_are_those_of_the_lock_and_detectron2(tmp_path: Path) -> None:
    """A stand-in for Python keeps what pip is called with; all else is done by the real one."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/usr/bin/env bash
[ "$2" = pip ] || exec {sys.executable} "$@"
printf '%s\\n' "$*" >>{tmp_path}/calls
cat "${{@: -1}}" >>{tmp_path}/requirements
"""
    )
    python.chmod(0o755)
    command = ["bash", str(ROOT / "tools/offline_wheels.sh"), str(tmp_path / "wheels")]
    environment = os.environ | {"PYTHON": str(python)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = (tmp_path / "calls").read_text().splitlines()
    start = f"-m pip download --no-deps --require-hashes --dest {tmp_path}/wheels "
    assert first == f"{start}--requirement {ROOT}/requirements.lock"
    assert second.startswith(f"{start}--python-version 3.10 --only-binary=:all: --requirement ")
    requirement, digest = install.SOURCE_REQUIREMENT, install.SOURCE_SHA256
    pinned = f"{requirement} --hash=sha256:{digest}\n"
    lock = (ROOT / "requirements.lock").read_text()
    assert (tmp_path / "requirements").read_text() == lock + pinned


def test_doctor_finds_this_environment_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ready"]
    assert [item["name"] for item in report["findings"]] == list(doctor.CHECKS)
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--jsn"])
    assert "did you mean --json?" in capsys.readouterr().err


def test_doctor_works_where_nothing_is_installed() -> None:
    command = [sys.executable, "-IS", str(ROOT / "tools/doctor.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, json.loads(done.stdout)["ready"]) == (1, False), done.stderr


def test_doctor_names_the_remedy(monkeypatch, capsys) -> None:
    def broken() -> doctor.Finding:
        raise ImportError("libGL.so.1: cannot open shared")

    monkeypatch.setattr(doctor, "CHECKS", {"OpenCV": broken})
    assert doctor.main([]) == 1
    assert "apt-get install libgl1" in capsys.readouterr().out
    error = RuntimeError("operator torchvision::nms does not exist")
    assert "from one index" in doctor.remedy_for("devices", error)
