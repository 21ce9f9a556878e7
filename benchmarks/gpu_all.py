"""Every check and benchmark that needs a GPU, one after the other, in one JSON and one table.

Called by benchmarks/gpu_all.sh, which makes the environment. Each part has a time limit; one that
fails or takes too long is told in the table, and the others go on. On a machine without a GPU, or
with --tiny, everything runs at tiny sizes on the CPU: that shows that the parts work, no speed.

Example:
  bash benchmarks/gpu_all.sh --out figures
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT
from common.errors import command_parser, run_command
from common.files import read_record_or_none, write_json, write_text
from common.provenance import describe

GPU_TESTS = (  # files, since others need packages that such a machine lacks
    "tests/benchmarks/test_train_step.py",
    "tests/pretrain/data/test_augment.py",
    "tests/pretrain/engine/test_gpu.py",
    "tests/pretrain/engine/test_host_sync.py",
    "tests/pretrain/engine/test_input_pipeline.py",
    "tests/pretrain/engine/test_speed.py",
)
TINY = [
    "--device", "cpu", "--depth", "18", "--width", "4", "--image-size", "32", "--batch-size", "4",
    "--queue-size", "64", "--dim", "8", "--hidden-dim", "8",
]  # fmt: skip
FA_CELLS = "byol/parallel/nn,byol/parallel/nn@4,byol/parallel/mask,infonce/parallel/mask@4"


@dataclass(frozen=True)
class Part:
    """A program that writes a JSON, or prints pytest's last line.

    Attributes:
        name: In the table; OUT/<name>.json and OUT/<name>.log are its files.
        command: After the interpreter; "JSON" stands for its file.
        limit: Seconds after which it is stopped.
        rows: What of its JSON is shown: title -> (keys on the way, goal).
    """

    name: str
    command: Sequence[str]
    limit: int
    rows: Mapping[str, tuple[Sequence[str], str]]


def parts(*, is_tiny: bool, num_workers: int) -> list[Part]:
    """What is run, in this order, the checks first: 8 minutes at most on one card."""
    step = ["benchmarks/train_step.py", "--json", "JSON", "--workers", str(num_workers)]
    fa = ["benchmarks/fa_overhead.py", "--json", "JSON", "--cells", FA_CELLS]
    step += (
        [*TINY, "--rounds", "1"] if is_tiny else ["--rounds", "2", "--set", "engine.compile=true"]
    )
    fa += [*TINY, "--repeats", "1", "--fa-repeats", "1"] if is_tiny else ["--repeats", "3"]
    return [
        Part("tests", ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *GPU_TESTS],
             120, {}),
        Part("train_step", step, 200, {
            "R50 BYOL step, ours (images/s)": (["images_per_second", "ours"], ""),
            "ours / solo-learn-like": (["ratios", "ours/solo-learn-like"], ">= 1.5"),
            "ours / lightly-like": (["ratios", "ours/lightly-like"], ">= 1.5"),
            "from shards / synthetic": (["from_shards_share"], ">= 0.95"),
        }),
        Part("fa_overhead", fa, 130, {
            f"FA's share of a step, {cell}": (["cells", cell, "fa_share"], goal)
            for cell, goal in zip(FA_CELLS.split(","), ("<= 0.01", "<= 0.03", "<= 0.01",
                                                       "<= 0.03"), strict=True)
        }),
    ]  # fmt: skip


def run_part(part: Part, out: Path) -> dict[str, Any]:
    """Run one, with what it prints in its log.

    Returns:
        status: "done", "failed" or "stopped after N s"; seconds; last: its last line; figures: its
        JSON, or null.
    """
    figures, log = out / f"{part.name}.json", out / f"{part.name}.log"
    figures.unlink(missing_ok=True)
    command = [sys.executable, *(str(figures) if x == "JSON" else x for x in part.command)]
    began = time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=part.limit,
                check=False,
            ).returncode  # fmt: skip
            status = "done" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {part.limit} s"
    lines = [x for x in log.read_text(errors="replace").splitlines() if x.strip()]
    return {
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "last": lines[-1] if lines else "",
        "figures": read_record_or_none(figures),
    }


def table(found: Mapping[str, dict[str, Any]], every: Sequence[Part], device: str) -> str:
    """Markdown: a row for each part and for each of its figures, with the goal."""
    rows = [f"Device: {device}", "", "| what | figure | goal |", "|---|---|---|"]
    for part in every:
        result = found[part.name]
        said = result["status"] if part.rows else f"{result['status']}: {result['last']}"
        rows.append(f"| {part.name} ({result['seconds']} s) | {said} | |")
        for title, (keys, goal) in part.rows.items():
            value: Any = result["figures"]
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            shown = "-" if value is None else f"{value:.4g}"
            rows.append(f"| {title} | {shown} | {goal} |")
    return "\n".join(rows) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 if a part failed or was stopped."""
    parser = command_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for all files")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on the CPU")
    names = [part.name for part in parts(is_tiny=True, num_workers=1)]
    parser.add_argument("--only", action="append", choices=names, help="may be repeated")
    options = parser.parse_args(argv)
    is_tiny = options.tiny or not torch.cuda.is_available()

    def work() -> int:
        every = parts(is_tiny=is_tiny, num_workers=1 if is_tiny else (os.cpu_count() or 2) - 1)
        every = [part for part in every if not options.only or part.name in options.only]
        options.out.mkdir(parents=True, exist_ok=True)
        device = "CPU, tiny sizes: no speed" if is_tiny else torch.cuda.get_device_name()
        found: dict[str, dict[str, Any]] = {}
        for part in every:
            print(f"{part.name}: at most {part.limit} s", file=sys.stderr, flush=True)
            found[part.name] = run_part(part, options.out)
            # After each, so that what was measured is there if the machine is taken away.
            about = {"device": device, "python": platform.python_version(), **describe()}
            write_json(options.out / "gpu.json", {**about, "parts": found})
            done = [one for one in every if one.name in found]
            write_text(options.out / "gpu.md", table(found, done, device))
        print((options.out / "gpu.md").read_text(), end="")
        return 0 if all(one["status"] == "done" for one in found.values()) else 1

    return run_command(work, when_interrupted="stopped; OUT/gpu.json has what was finished")


if __name__ == "__main__":
    sys.exit(main())
