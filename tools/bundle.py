"""Pack code, wheels and a small data set into one folder and one tar for a machine without network.

OUT/ is the folder, OUT.tar the same as one file. On the other machine: unpack it and call run.sh,
which needs Python, torch and what else --has names, but no network. docs/offline.md tells the rest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools import bundle_wheels, install_detectron2  # noqa: E402
from tools.bundle_wheels import HAS, MACHINES, Target  # noqa: E402
from tools.flow.config import PipelineConfig, as_dict, load_config  # noqa: E402
from tools.flow.environment import commit  # noqa: E402
from tools.flow.errors import StageError, UserError  # noqa: E402
from tools.flow.files import write_json  # noqa: E402
from tools.flow.stages import config_bases, find_config  # noqa: E402
from tools.offline_setup import MANIFEST, sha256_of  # noqa: E402
from tools.purepy_wheel import VERSION, WHEEL_SHA256, InstallError  # noqa: E402

EXAMPLE = """\
examples:
  bash tools/bundle.sh bundle --python 3.12
  bash tools/bundle.sh bundle --preset demo data.options.num_pool=3000
  bash tools/bundle.sh bundle --shards data/shards --has torch torchvision numpy opencv-python

Exit status: 0 packed; 1 it went wrong (pip, disk); 2 wrong arguments or input, or above --max-mb.
"""
FORMAT = "fa-bundle-1"
CODE_FOLDERS = ("pretrain", "detection", "tools", "configs")
README = """\
Made by tools/bundle.sh from commit {commit}, for Python {python} on Linux {machine}.

  bash run.sh --help      what happens; bash run.sh does it
  {manifest:<22}  SHA-256 of every file: sha256sum -c --quiet {manifest}
  bundle.json             what was packed;  pipeline.yaml   what run.sh runs
  code/                   the project (code/docs/offline.md);  wheels/, data/   what it needs
"""


@dataclass(frozen=True)
class Plan:
    """What is packed.

    Attributes:
        out: The folder to make; the tar lies beside it.
        preset: The pipeline's YAML, or its name.
        overrides: ``key=value`` settings of the pipeline.
        shards: Ready shards for pretraining instead of the pipeline's own; None for those.
        target: The machine that it is for.
        max_bytes: Of the tar.
    """

    out: Path
    preset: str
    overrides: tuple[str, ...]
    shards: Path | None
    target: Target
    max_bytes: int

    @property
    def tar(self) -> Path:
        """The one file."""
        return self.out.with_name(self.out.name + ".tar")


class Folder:
    """The bundle while it grows; refuses what would make it larger than it may be."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path, self.max_bytes = path, max_bytes
        self.num_bytes: dict[str, int] = {}

    def add(self, source: Path, name: str) -> None:
        """Copy a file, or a folder with all below it.

        Raises:
            UserError: If there is a link to elsewhere, or the bundle grows too large.
        """
        files = [source] if source.is_file() else sorted(source.rglob("*"))
        for file in files:
            if file.is_symlink():
                raise UserError(f"{file} is a link; a bundle holds files only: put the file there")
            if file.is_file():
                target = self.path / name if file == source else self.path / name / (
                    file.relative_to(source)
                )  # fmt: skip
                self.count(name, file.stat().st_size)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
                target.chmod(0o755 if file.stat().st_mode & stat.S_IXUSR else 0o644)

    def count(self, name: str, num_bytes: int) -> None:
        """Note what a file takes in the tar: its bytes in blocks of 512, and a header.

        Raises:
            UserError: If that is too much, with the shares of the parts.
        """
        part = name.split("/")[0]
        self.num_bytes[part] = self.num_bytes.get(part, 0) + 512 + -(-num_bytes // 512) * 512
        if sum(self.num_bytes.values()) > self.max_bytes:
            raise too_large(self.num_bytes, self.max_bytes)

    def files(self) -> list[Path]:
        """All files, sorted by name, relative to the folder."""
        return sorted(p.relative_to(self.path) for p in self.path.rglob("*") if p.is_file())


def too_large(num_bytes: dict[str, int], max_bytes: int) -> UserError:
    """The refusal of a bundle above the limit."""
    parts = ", ".join(f"{name} {n / 1e6:.1f} MB" for name, n in sorted(num_bytes.items()))
    return UserError(
        f"the bundle is above --max-mb {max_bytes / 1e6:g} with {parts}; pack fewer pictures (such "
        "as data.options.num_pool=1000), or fewer or smaller --shards, or allow more"
    )


def code_files() -> list[str]:
    """What git tracks, as it is in the working tree, and new files among the code.

    Raises:
        UserError: Outside git.
    """
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    names: set[str] = set()
    for words in ([], ["--others", "--exclude-standard", "--", *CODE_FOLDERS]):
        done = subprocess.run([*git, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{ROOT} is no git checkout ({done.stderr.strip()}); pack from one")
        names |= {name for name in done.stdout.split("\0") if (ROOT / name).is_file()}
    return sorted(names)


def add_code(folder: Folder, config: PipelineConfig) -> None:
    """The project's files.

    Raises:
        UserError: If the pipeline names a config that is not among them.
    """
    names = code_files()
    detection = find_config(ROOT, config.detection.config)
    used = [find_config(ROOT, config.pretrain.config), detection, *config_bases(detection)]
    packed = {(ROOT / name).resolve() for name in names}
    for file in used:
        if file.resolve() not in packed:
            raise UserError(f"{file} does not travel: put it into {ROOT / 'configs'}")
    for name in names:
        folder.add(ROOT / name, f"code/{name}")
    folder.add(ROOT / "tools/run_bundle.sh", "run.sh")


def add_wheels(folder: Folder, target: Target) -> tuple[list[dict[str, Any]], list[str]]:
    """The wheels that the target lacks, and what pip reads there.

    Returns:
        (name, bytes and hash of each wheel; requirements of the project that must hold there).
    Raises:
        StageError, InstallError: If pip or the repacking of Detectron2 fails.
    """
    names, requirements = bundle_wheels.needed(target)
    locked = bundle_wheels.read_lock((ROOT / "requirements.lock").read_text(), names, target)
    with tempfile.TemporaryDirectory() as scratch:
        wheels = Path(scratch)
        bundle_wheels.fetch(locked, target, wheels)
        install_detectron2.build_wheel(wheels)
        detectron2 = f"detectron2=={VERSION} --hash=sha256:{WHEEL_SHA256}"
        lines = bundle_wheels.requirement_lines(wheels, locked, [detectron2])
        Path(wheels, "requirements.txt").write_text("".join(f"{line}\n" for line in lines))
        folder.add(wheels, "wheels")
        rows = [
            {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(wheels.glob("*.whl"))
        ]
    return rows, requirements


def add_data(folder: Folder, plan: Plan, config: PipelineConfig) -> dict[str, str]:
    """The pipeline's data: made here by its own stages, or copied if it names existing data.

    Returns:
        The data section for pipeline.yaml, paths relative to the bundle.
    """
    data = config.data
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch)
        if data.kind != "existing" or (data.pool is not None and plan.shards is None):
            _make_data(plan, run, "data" if plan.shards is not None else "shards")
        made = run / "data"
        sources = {
            "shards": plan.shards or Path(data.shards or run / "shards"),
            "dataset": Path(data.dataset or made),
            "probe_train": Path(data.probe_train or made / "probe/train"),
            "probe_val": Path(data.probe_val or made / "probe/val"),
        }
        if data.kind == "existing" and data.probe_train is None:
            del sources["probe_train"], sources["probe_val"]
        check_shards(sources["shards"])
        section = {"kind": "existing"}
        for key, source in sources.items():
            section[key] = f"data/{key}"
            parts = ("dataset.json", "VOC2007", "VOC2012") if key == "dataset" else ("",)
            for part in parts:
                if (source / part).exists():
                    folder.add(source / part, f"data/{key}/{part}".rstrip("/"))
    return section


def check_shards(folder: Path) -> None:
    """Refuse shards that are not complete.

    Raises:
        UserError: Without an index, or if files that it lists are missing or of another size.
    """
    index = folder / "index.json"
    if not index.is_file():
        raise UserError(f"{index}: not there; --shards takes a folder made by tools/make_shards.py")
    content = json.loads(index.read_text(encoding="utf-8"))
    sizes = {shard["name"]: shard["bytes"] for shard in content["shards"]}
    wrong = [
        name for name, num_bytes in sizes.items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != num_bytes
    ]  # fmt: skip
    if wrong or not (folder / content["samples"]).is_file():
        raise UserError(
            f"{folder}: {(wrong or [content['samples']])[0]} is missing or not as the index says; "
            "see tools/make_shards.py --verify"
        )


def _make_data(plan: Plan, out: Path, until: str) -> None:
    command = [sys.executable, str(ROOT / "tools/run_pipeline.py"), plan.preset, *plan.overrides,
               "--out", str(out), "--until", until]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"the data could not be made:\n{(done.stdout + done.stderr).strip()}")


def add_text(folder: Folder, name: str, text: str) -> None:
    """A file made from text."""
    folder.count(name, len(text.encode()))
    (folder.path / name).write_text(text, encoding="utf-8")


def write_manifest(folder: Folder) -> None:
    """SHA-256 of every file, in the format of `sha256sum`."""
    lines = [f"{sha256_of(folder.path / path)}  {path.as_posix()}\n" for path in folder.files()]
    add_text(folder, MANIFEST, "".join(lines))


def write_tar(folder: Folder, tar: Path, name: str) -> None:
    """One file whose bytes depend on the folder's files alone: sorted, one time, no owner."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime, info.uid, info.gid, info.uname, info.gname = 315532800, 0, 0, "", ""
        return info

    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as archive:
        for path in folder.files():
            archive.add(folder.path / path, f"{name}/{path.as_posix()}", filter=plain)


def pack(plan: Plan, say: Callable[[str], None]) -> int:
    """Make the folder and the tar; both appear under their names only when complete.

    Returns:
        The size of the tar in bytes.
    Raises:
        UserError, StageError, InstallError: If it cannot be made, or is larger than allowed.
    """
    for path in (plan.out, plan.tar):
        if path.exists():
            raise UserError(f"{path} is there already; take it away or choose another OUT")
    if plan.shards is not None:
        check_shards(plan.shards)
    preset = ROOT / f"configs/pipeline/{plan.preset}.yaml"
    config = load_config(preset if preset.is_file() else Path(plan.preset), plan.overrides)
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{plan.out.name}-", dir=plan.out.parent) as scratch:
        folder = Folder(Path(scratch, "bundle"), plan.max_bytes)
        folder.path.mkdir()
        add_code(folder, config)
        say("code is there; fetching wheels")
        wheels, requirements = add_wheels(folder, plan.target)
        say(f"{len(wheels)} wheels are there; making the data")
        section = add_data(folder, plan, config)
        settings = as_dict(config) | {"data": section}
        add_text(folder, "pipeline.yaml", yaml.safe_dump(settings, sort_keys=False))
        about = {
            "format": FORMAT, "commit": commit(ROOT), "python": plan.target.python,
            "machine": plan.target.machine, "has": list(plan.target.has),
            "requirements": requirements, "wheels": wheels, "bytes": folder.num_bytes,
        }  # fmt: skip
        write_json(folder.path / "bundle.json", about)
        folder.count("bundle.json", (folder.path / "bundle.json").stat().st_size)
        add_text(folder, "README.txt", README.format(manifest=MANIFEST, **about))
        write_manifest(folder)
        tar = Path(scratch, "bundle.tar")
        write_tar(folder, tar, plan.out.name)
        num_bytes = tar.stat().st_size
        if num_bytes > plan.max_bytes:
            raise too_large(folder.num_bytes, plan.max_bytes)
        folder.path.rename(plan.out)
        tar.rename(plan.tar)
    parts = ", ".join(f"{name} {n / 1e6:.1f}" for name, n in sorted(folder.num_bytes.items()))
    say(f"{plan.out} and {plan.tar}: {num_bytes / 1e6:.1f} MB ({parts})")
    return num_bytes


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    main_parser = argparse.ArgumentParser(
        prog="bash tools/bundle.sh", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = main_parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to make; OUT.tar lies beside it")
    add("overrides", nargs="*", metavar="key=value", help="settings of the pipeline to change")
    add("--preset", default="smoke", metavar="PIPELINE",
        help="smoke, demo, photos or a pipeline YAML: whose data is packed, and what run.sh runs "
        "(default: smoke)")  # fmt: skip
    add("--shards", type=Path, metavar="DIR", help="pretrain on these shards instead")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    add("--python", default=here, metavar="3.N", help=f"the machine's Python (default: {here})")
    add("--machine", default="x86_64", choices=MACHINES, help="its processor (default: x86_64)")
    add("--has", nargs="+", default=HAS, metavar="NAME",
        help=f"packages that it brings, with all they need (default: {' '.join(HAS)})")  # fmt: skip
    add("--max-mb", type=float, default=60.0, metavar="MB",
        help="largest tar, in 10^6 bytes (default: 60)")  # fmt: skip
    return main_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_intermixed_args(arguments)
    try:
        target = Target(options.python, options.machine, tuple(options.has))
        plan = Plan(
            options.out.absolute(), options.preset, tuple(options.overrides), options.shards,
            target, int(options.max_mb * 1e6),
        )  # fmt: skip
        pack(plan, lambda text: print(text, flush=True))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (StageError, InstallError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
