"""The bundle: what is chosen, what is refused, and a run of it where there is no network."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import bundle, bundle_wheels, offline_setup
from tools.bundle_wheels import Target
from tools.flow.errors import UserError

ROOT = Path(__file__).parents[2]
TARGET = Target("3.12")

# --- which wheels ---------------------------------------------------------------------------------

METADATA = {
    bundle_wheels.PROJECT: [
        "torch>=2.8", "fsspec[http]>=2025.3", "Reader_X", "pytest; extra == 'dev'",
        "old; python_version < '3.12'", "new; python_version >= '3.12'", "zstandard",
        "mac; sys_platform == 'darwin'", "arm; platform_machine == 'aarch64'",
    ],
    "torch": ["fsspec>=0.8.5", "jinja2"],
    "fsspec": ["aiohttp; extra == 'http'", "s3fs; extra == 's3'"],
    "aiohttp": ["idna"],
    "reader-x": ["idna", "jinja2", "reader-x"],
}  # fmt: skip


def requires(name: str) -> list[str]:
    return METADATA.get(name, [])


def test_packed_is_what_the_project_needs_and_the_target_lacks() -> None:
    """torch brings fsspec, but not what fsspec needs for http, which the project asks for."""
    target = Target("3.12", has=("torch",))
    names, requirements = bundle_wheels.needed(target, requires)
    assert names == ["aiohttp", "idna", "new", "reader-x"]
    assert requirements == ["fsspec>=2025.3", "new", "reader-x", "torch>=2.8"]


def test_markers_are_those_of_the_target() -> None:
    names, _ = bundle_wheels.needed(Target("3.11", "aarch64", ("torch",)), requires)
    assert {"old", "arm"} <= set(names)
    assert not {"new", "mac", "pytest", "s3fs"} & set(names)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_real_lock_has_all_that_is_packed(python: str) -> None:
    target = Target(python)
    names, requirements = bundle_wheels.needed(target)
    locked = bundle_wheels.read_lock((ROOT / "requirements.lock").read_text(), names, target)
    assert [package.name for package in locked] == names
    assert all(package.hashes for package in locked)
    assert {"simplejpeg", "pycocotools", "fvcore", "iopath", "webdataset", "aiohttp"} <= set(names)
    brought = {"torch", "numpy", "pillow", "packaging", "typing-extensions", "triton", "zstandard"}
    assert not brought & set(names)
    assert not [name for name in names if name.startswith("nvidia")]
    assert "torch>=2.8" in requirements


LOCK = f"""\
alpha==1.0 ; python_full_version < '3.12' \\
    --hash=sha256:{"a" * 64}
    # via beta
alpha==2.0 ; python_full_version >= '3.12' \\
    --hash=sha256:{"b" * 64} \\
    --hash=sha256:{"c" * 64}
Beta_X==3.1 \\
    --hash=sha256:{"d" * 64}
"""


def test_lock_is_read_for_the_target() -> None:
    alpha, beta = bundle_wheels.read_lock(LOCK, ["beta-x", "alpha"], TARGET)
    assert alpha.line() == f"alpha==2.0 --hash=sha256:{'b' * 64} --hash=sha256:{'c' * 64}"
    assert (beta.name, beta.version) == ("beta-x", "3.1")
    assert bundle_wheels.read_lock(LOCK, ["alpha"], Target("3.11"))[0].version == "1.0"
    with pytest.raises(UserError, match=r"pins no gamma for Python 3\.12"):
        bundle_wheels.read_lock(LOCK, ["alpha", "gamma"], TARGET)


@pytest.mark.parametrize("python", ["3.10", "3", "4.1", "3.12.1", "three"])
def test_strange_python_is_refused(python: str, tmp_path: Path, capsys) -> None:
    assert bundle.main([str(tmp_path / "out"), "--python", python]) == 2
    assert f"--python {python}: give 3.11 or newer" in capsys.readouterr().err


# --- the folder and the tar -----------------------------------------------------------------------


def small_folder(path: Path, max_bytes: int = 10**6) -> bundle.Folder:
    path.mkdir()
    folder = bundle.Folder(path, max_bytes)
    source = path.with_name(f"{path.name}-source")
    (source / "below").mkdir(parents=True)
    (source / "a.txt").write_text("a" * 700)
    (source / "below/run.sh").write_text("echo\n")
    (source / "below/run.sh").chmod(0o700)
    folder.add(source, "code")
    folder.add(source / "a.txt", "a.txt")
    return folder


def test_tar_holds_the_folder_and_depends_on_its_files_alone(tmp_path: Path) -> None:
    tars = []
    for name in ("first", "second"):
        folder = small_folder(tmp_path / name)
        os.utime(folder.path / "a.txt", (1, len(name)))
        bundle.write_tar(folder, tmp_path / f"{name}.tar", "bundle")
        tars.append((tmp_path / f"{name}.tar").read_bytes())
    assert tars[0] == tars[1]
    counted = sum(folder.num_bytes.values())
    assert counted <= len(tars[0]) <= counted + 2 * tarfile.RECORDSIZE
    with tarfile.open(tmp_path / "first.tar") as archive:
        modes = {member.name: member.mode for member in archive.getmembers()}
    assert modes == {
        "bundle/a.txt": 0o644, "bundle/code/a.txt": 0o644, "bundle/code/below/run.sh": 0o755,
    }  # fmt: skip


def test_too_large_is_refused_with_the_parts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"above --max-mb 0\.003 with a\.txt 0\.0 MB, code 0\.0 MB"):
        small_folder(tmp_path / "folder", 3000)
    assert small_folder(tmp_path / "other", 5000).num_bytes == {"code": 2560, "a.txt": 1536}


def test_links_are_refused(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "folder")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"data/link is a link"):
        folder.add(tmp_path / "data", "data")


def test_manifest_is_one_of_sha256sum_and_finds_damage(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "folder")
    bundle.write_manifest(folder)
    command = ["sha256sum", "--check", "--quiet", "--strict", offline_setup.MANIFEST]
    assert subprocess.run(command, cwd=folder.path, check=False).returncode == 0
    assert offline_setup.check_files(folder.path) == 3
    (folder.path / "code/a.txt").write_text("b" * 700)
    (folder.path / "a.txt").unlink()
    with pytest.raises(offline_setup.SetupError, match=r"2 of 3 files .* a\.txt, code/a\.txt;"):
        offline_setup.check_files(folder.path)


def test_nothing_is_overwritten(tmp_path: Path, capsys) -> None:
    (tmp_path / "out.tar").touch()
    assert bundle.main([str(tmp_path / "out")]) == 2
    assert "out.tar is there already" in capsys.readouterr().err


def test_wrong_input_is_refused_before_anything_is_fetched(tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "out")
    assert bundle.main([out, "--preset", "nosuch"]) == 2
    assert "nosuch cannot be read" in capsys.readouterr().err
    assert bundle.main([out, "data.nosuch=3"]) == 2
    assert "nosuch" in capsys.readouterr().err
    assert bundle.main([out, "--shards", str(tmp_path)]) == 2
    assert "index.json: not there" in capsys.readouterr().err
    (tmp_path / "index.json").write_text(
        json.dumps({"shards": [{"name": "shard-000000.tar", "bytes": 3}], "samples": "samples.npy"})
    )
    (tmp_path / "shard-000000.tar").write_text("four")
    assert bundle.main([out, "--shards", str(tmp_path)]) == 2
    assert "shard-000000.tar is missing or not as the index says" in capsys.readouterr().err
    own = tmp_path / "own.yaml"
    own.write_text((ROOT / "configs/pipeline/smoke.yaml").read_text().replace(
        "configs/pretrain/demo.yaml", str(ROOT / "../somewhere.yaml")))  # fmt: skip
    assert bundle.main([out, "--preset", str(own)]) == 2
    assert "somewhere.yaml does not exist" in capsys.readouterr().err


# --- on the target --------------------------------------------------------------------------------


def test_other_python_or_machine_is_refused() -> None:
    here = {"python": f"{sys.version_info.major}.{sys.version_info.minor}",
            "machine": platform.machine()}  # fmt: skip
    offline_setup.check_machine(here)
    for changed in ({"python": "3.99"}, {"machine": "riscv64"}):
        with pytest.raises(offline_setup.SetupError, match=r"is for Python .* pack again"):
            offline_setup.check_machine(here | changed)


def test_environment_sees_the_packages_of_the_one_it_was_made_in(tmp_path: Path) -> None:
    packages = offline_setup.make_environment(tmp_path / "env")
    assert packages.is_relative_to(tmp_path / "env")
    python = tmp_path / "env/bin/python"
    offline_setup.check_requirements(python, ["torch>=2.8", "opencv-python>=4.10", "yacs"])
    with pytest.raises(offline_setup.SetupError) as caught:
        offline_setup.check_requirements(python, ["torch>=99", "nosuchpackage>=1"])
    assert f"torch>=99: {importlib.metadata.version('torch')} is there" in str(caught.value)
    assert "nosuchpackage>=1: not there" in str(caught.value)


def test_stamp_is_the_one_that_setup_compares() -> None:
    lines = ["cat requirements.lock tools/purepy_wheel.py | cksum"]
    text = (ROOT / "tools/setup.sh").read_text()
    assert lines[0] in text
    shell = subprocess.run(["bash", "-c", *lines], cwd=ROOT, capture_output=True, text=True)
    assert offline_setup.stamp(ROOT) == shell.stdout


@pytest.mark.parametrize("words", [["bash", "tools/run_bundle.sh"],
                                   [sys.executable, "tools/offline_setup.py"]])  # fmt: skip
def test_outside_a_bundle_it_is_told(words: list[str]) -> None:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "tools/bundle.sh" in done.stderr


def offline_machine(folder: Path) -> Path:
    """A Python that has what HAS names, what that needs, and pip; nothing else of this project."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    inside = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    waiting, seen = [*bundle_wheels.HAS, "pip"], set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for part in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (inside / part).exists():
                (inside / part).symlink_to(package.locate_file(part))
        needs = [Requirement(word) for word in package.requires or []]
        waiting += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert not (inside / "simplejpeg").exists()
    return folder / "bin/python"


def can_cut_the_network() -> bool:
    command = shutil.which("unshare")
    return (
        command is not None
        and not subprocess.run(
            [command, "-rn", "true"], capture_output=True, check=False
        ).returncode
    )


@pytest.mark.slow
@pytest.mark.skipif(not can_cut_the_network(), reason="no `unshare -rn` here (util-linux)")
def test_bundle_runs_without_network(tmp_path: Path) -> None:
    """Packed, unpacked elsewhere, set up and run: pretraining, conversion, detection, report."""
    command = ["bash", str(ROOT / "tools/bundle.sh"), str(tmp_path / "bundle"),
               "detection.arms=[pretrained]"]  # fmt: skip
    packed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert packed.returncode == 0, packed.stderr
    tar = tmp_path / "bundle.tar"
    assert tar.stat().st_size < 60e6
    wheels = sum(path.stat().st_size for path in (tmp_path / "bundle/wheels").glob("*.whl"))
    assert wheels < 10e6
    there = tmp_path / "there"
    with tarfile.open(tar) as archive:
        archive.extractall(there, filter="data")
    python = offline_machine(tmp_path / "machine")
    cut = ["unshare", "-rn", "bash", str(there / "bundle/run.sh")]
    quiet = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
    done = subprocess.run(
        cut, env=quiet | {"PYTHON": str(python)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((there / "bundle/runs/smoke/results.json").read_text())
    assert results["unfinished"] == []
    assert results["conversion"]["max_relative_difference"] < 1e-4
    assert [row["seed"] for row in results["detection"]["pretrained"]] == [0]
    assert (there / "bundle/runs/smoke/report.html").stat().st_size > 0
    setup = subprocess.run(["bash", "code/tools/setup.sh"], cwd=there / "bundle",
                           capture_output=True, text=True, check=False)  # fmt: skip
    assert "set-up is complete" in setup.stdout  # the usual commands do not want the network
