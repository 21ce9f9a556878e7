"""FA methods against each other: kNN accuracy after short runs, several seeds, paired with `none`.

Each run is `python -m pretrain CONFIG ...` in a folder of its own; a finished one is not run again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from tools.flow.statistics import mean_std, paired_difference

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = """example:
  .venv/bin/python benchmarks/fa_study.py --shards runs/photos/shards \\
      --probe-train runs/photos/probe_train --probe-val runs/photos/probe_val \\
      --out runs/fa_study --json fa_study.json
"""
CELLS = {
    "none": ["fa.method=none"],
    "identity": ["fa.method=identity"],
    "nn": ["fa.method=nn"],
    "nn, one of 5": ["fa.method=nn", "fa.top_k=5"],
    "mask": ["fa.method=mask"],
    "noise": ["fa.method=noise"],
    "mixup": ["fa.method=mixup"],
    "cutmix": ["fa.method=cutmix"],
    "extrapolate": ["fa.method=extrapolate"],
    "mask x 4, free": ["fa.method=mask", "fa.num_features=4", "fa.feature_loss=free"],
}


def run(folder: Path, arguments: argparse.Namespace, overrides: list[str]) -> float:
    """One run's kNN accuracy, 0..1.

    Raises:
        RuntimeError: With the end of its output, if the run fails.
    """
    summary = folder / "summary.json"
    if not summary.exists():
        words = [
            *(sys.executable, "-m", "pretrain", str(arguments.config), f"out={folder}"),
            f"data.shards={arguments.shards.resolve()}",
            f"eval.probe_train={arguments.probe_train.resolve()}",
            f"eval.probe_val={arguments.probe_val.resolve()}",
            *overrides,
            *(["--resume"] if (folder / "checkpoint.pth").exists() else []),
        ]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{folder.name} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(summary.read_text())["knn_top1"]


def table(accuracy: dict[str, dict[int, float]]) -> list[dict[str, Any]]:
    """A row for each method: mean and deviation over the seeds, and the paired difference."""
    rows = []
    for name, values in accuracy.items():
        difference = paired_difference(values, accuracy["none"])
        rows.append(
            {"method": name, **mean_std(list(values.values())), "values": values}
            | {"minus_none": difference["mean"], "interval": difference["student_t"]}
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table for people, in percent."""
    print(f"{'method':16s} {'kNN top-1':>14s}   minus none [95 % interval, Student's t]")
    for row in rows:
        spread = f" ± {100 * row['std']:.1f}" if row["std"] is not None else ""
        text = f"{row['method']:16s} {100 * row['mean']:7.1f}{spread:7s}"
        if row["method"] != "none":
            text += f"   {100 * row['minus_none']:+.1f}"
            if row["interval"] is not None:
                low, high = row["interval"]
                text += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
        print(text)


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs/pretrain/fa_study.yaml")
    for name, text in (
        ("--shards", "unlabelled pictures"),
        ("--probe-train", "labelled pictures the kNN probe compares with"),
        ("--probe-val", "labelled pictures it classifies"),
        ("--out", "folder of the runs"),
    ):
        parser.add_argument(name, type=Path, required=True, metavar="DIR", help=text)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0..N-1 (3)")
    parser.add_argument("--methods", nargs="+", choices=CELLS, default=list(CELLS), metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    arguments = parser.parse_args(words)
    if arguments.seeds < 1:
        parser.error(f"--seeds is {arguments.seeds}: give 1 or more")
    if "none" not in arguments.methods:
        arguments.methods.insert(0, "none")
    return arguments


def main(words: list[str] | None = None) -> int:
    """Run the study; 1 if a run failed."""
    arguments = parse(words)
    accuracy: dict[str, dict[int, float]] = {name: {} for name in arguments.methods}
    jobs = [(seed, name) for seed in range(arguments.seeds) for name in arguments.methods]
    for seed, name in tqdm(jobs, desc="study", unit="run", file=sys.stderr):
        label = "".join(c if c.isalnum() else "_" for c in name)
        overrides = [f"seed={seed}", *CELLS[name], *arguments.overrides]
        try:
            accuracy[name][seed] = run(arguments.out / f"{label}-{seed}", arguments, overrides)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    rows = table(accuracy)
    show(rows)
    if arguments.json:
        settings = {"config": arguments.config.name, "overrides": arguments.overrides}
        arguments.json.write_text(json.dumps(settings | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
