"""Pack pictures into WebDataset shards with an index; verify shards; say what they hold."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from common.errors import UserError, printable, run_command
from common.files import write_json
from common.slurm import add_slurm_option
from pipeline.datasets.importers import Source, open_source
from pretrain.data.pack.cluster import Cluster
from pretrain.data.pack.info import format_info, gather_info, save_pictures, verify_shards
from pretrain.data.pack.plan import ShardOptions, SourcePicture
from pretrain.data.pack.writer import WriteReport, write_shards
from pretrain.data.shards import ShardIndex

EXAMPLE = """\
SOURCE is a folder of pictures, a tree of class folders (ImageNet-style), or a VOC devkit.

examples:
  .venv/bin/python tools/make_shards.py data/scenes/pool data/shards
  .venv/bin/python tools/make_shards.py imagenet data/imagenet --split train --resize-short 256
  .venv/bin/python tools/make_shards.py VOCdevkit data/voc07 --split trainval
  .venv/bin/python tools/make_shards.py imagenet data/imagenet --split train \\
      --submitit slurm --num-tasks 16 --slurm-partition cpu --num-workers 8
  .venv/bin/python tools/make_shards.py data/shards --verify
  .venv/bin/python tools/make_shards.py data/shards --info --pictures sheet.jpg

A killed run goes on where it stopped when the same command is given again.
Exit status: 0 done; 1 it went wrong, or --verify found a fault; 2 wrong arguments or input.
"""


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    default = ShardOptions()
    main_parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = main_parser.add_argument
    add("source", metavar="SOURCE", help="pictures; with --verify, --info: the shards")
    add("out", type=Path, nargs="?", metavar="OUT", help="folder for the shards")
    add("--split", metavar="NAME", help="list of a VOC devkit (train, trainval, ..) or sub-folder")
    add("--labels", choices=("auto", "none"), default="auto",
        help="auto: class folders become labels (default); none: no labels")  # fmt: skip
    add("--max-samples-per-shard", type=int, default=default.max_samples_per_shard, metavar="N",
        help=f"most samples in a shard (default: {default.max_samples_per_shard})")  # fmt: skip
    add("--shard-size-mb", type=float, default=default.shard_size_mb, metavar="MB",
        help=f"about the largest shard, MB (default: {default.shard_size_mb:g})")  # fmt: skip
    add("--resize-short", type=int, metavar="S", help="shrink pictures to this short side, pixels")
    add("--quality", type=int, default=default.quality, metavar="Q",
        help=f"JPEG quality of shrunk pictures (default: {default.quality})")  # fmt: skip
    add("--shuffle-seed", type=int, default=default.shuffle_seed, metavar="N",
        help=f"seed of the order over all shards (default: {default.shuffle_seed})")  # fmt: skip
    add("--no-shuffle", action="store_true", help="keep the order of names")
    add("--num-workers", type=int, metavar="N",
        help="processes; the shards do not depend on it (default: all cores; with --submitit: 1 "
        "per task)")  # fmt: skip
    add("--max-bad", type=int, default=0, metavar="N",
        help="leave out and list up to N pictures that do not decode (default: 0)")  # fmt: skip
    add("--overwrite", action="store_true", help="throw away other shards in OUT first")
    add("--verify", action="store_true", help="check sizes, SHA-256 and samples against the index")
    add("--info", action="store_true", help="say what a set holds: sizes, formats, classes")
    add("--json", type=Path, metavar="FILE", help="with --info: write it as JSON too")
    add("--pictures", type=Path, metavar="FILE", help="with --info: write a sheet of pictures too")
    _add_cluster(main_parser)
    return main_parser


def _add_cluster(main_parser: argparse.ArgumentParser) -> None:
    group = main_parser.add_argument_group("several tasks, through submitit")
    add = group.add_argument
    add("--submitit", choices=("local", "slurm"), help="where tasks run; OUT must be shared")
    add("--num-tasks", type=int, metavar="N", help="tasks, each makes a share of the shards")
    add("--slurm-partition", metavar="NAME", help="partition of the tasks")
    add("--slurm-time-minutes", type=int, metavar="MIN",
        help="time limit of a task; at its end it is queued again (default: 240)")  # fmt: skip
    add("--slurm-mem-gb", type=float, metavar="GB", help="memory of a task")
    add_slurm_option(group)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    return run_command(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit status."""
    if (options.json or options.pictures) and not options.info:
        raise UserError("--json and --pictures need --info")
    if options.out is not None:
        pack(options)
    elif not (options.verify or options.info):
        raise UserError("OUT is missing; give SOURCE OUT, or SHARDS --verify or --info (--help)")
    shards = str(options.out or options.source)
    if options.verify and "://" in shards:
        raise UserError(
            f"{shards}: --verify reads every byte of a local folder; copy the set first"
        )
    status = verify(Path(shards), workers_of(options)) if options.verify else 0
    if options.info:
        info(shards, options.json, options.pictures)
    return status


def pack(options: argparse.Namespace) -> None:
    """Write the shards and say what was done."""
    if options.max_bad < 0:
        raise UserError("--max-bad must not be negative")
    cluster, num_workers = cluster_of(options), workers_of(options)
    shard_options = ShardOptions(
        max_samples_per_shard=options.max_samples_per_shard,
        shard_size_mb=options.shard_size_mb,
        resize_short=options.resize_short,
        quality=options.quality,
        shuffle_seed=None if options.no_shuffle else options.shuffle_seed,
    )
    source = open_source(options.source, split=options.split, labels=options.labels)
    print(printable(describe(source, options.source)), flush=True)
    report = write_shards(
        [SourcePicture(picture.path, picture.name, picture.label) for picture in source.pictures],
        options.out,
        options=shard_options,
        classes=None if source.classes is None else list(source.classes),
        num_workers=num_workers,
        max_bad=options.max_bad,
        overwrite=options.overwrite,
        progress=True,
        cluster=cluster,
    )
    print(printable(summary(report, options.out)))


def workers_of(options: argparse.Namespace) -> int:
    """Processes of this command, or of each of its tasks."""
    if options.num_workers is None:
        return 1 if options.submitit else os.cpu_count() or 1
    if options.num_workers < 0:
        raise UserError("--num-workers must not be negative")
    return options.num_workers


def cluster_of(options: argparse.Namespace) -> Cluster | None:
    """Where tasks run; None to work in this process."""
    asked = [name for name in vars(options) if name.startswith("slurm_") and getattr(options, name)]
    if asked and options.submitit != "slurm":
        raise UserError(f"--{asked[0].replace('_', '-')} needs --submitit slurm")
    if options.submitit is None:
        if options.num_tasks is not None:
            raise UserError("--num-tasks needs --submitit local or slurm")
        return None
    if options.num_tasks is None:
        raise UserError(f"--submitit {options.submitit} needs --num-tasks N")
    return Cluster(
        kind=options.submitit,
        num_tasks=options.num_tasks,
        partition=options.slurm_partition,
        time_minutes=240 if options.slurm_time_minutes is None else options.slurm_time_minutes,
        mem_gb=options.slurm_mem_gb,
        options=dict(options.slurm_option),
    )


def describe(source: Source, path: str) -> str:
    """One line on what the source turned out to be."""
    kind = {"folder": "a folder", "classes": "class folders", "voc": "a VOC devkit"}[source.kind]
    labels = f"{len(source.classes)} classes" if source.classes else "no labels"
    text = f"{path}: {kind}, {len(source.pictures)} pictures, {labels}"
    if source.ignored:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(source.ignored.items()))
        text += f"; other files ignored: {counts}"
    return text


def summary(report: WriteReport, out: Path) -> str:
    """What was written, kept and left out."""
    text = (
        f"{out}: {report.num_samples} samples in {report.num_shards} shards, "
        f"{report.num_bytes / 1e6:.1f} MB"
    )
    if report.num_shards_kept:
        text += f" ({report.num_shards_kept} shards were finished before)"
    if report.skipped:
        listed = "\n".join(f"  {item['reason']}" for item in report.skipped)
        text += f"\nleft out {len(report.skipped)} pictures (also listed in index.json):\n{listed}"
    return text


def verify(path: Path, num_workers: int) -> int:
    """Check shards; returns the exit status."""
    report = verify_shards(path, num_workers=num_workers, progress=True)
    for problem in report.problems:
        print(f"error: {problem}", file=sys.stderr)
    size = (
        f"{report.num_samples} samples in {report.num_shards} shards, "
        f"{report.num_bytes / 1e6:.1f} MB"
    )
    print(
        f"{path}: {size}: "
        + ("all as the index says" if report.ok else f"{len(report.problems)} faults")
    )
    return 0 if report.ok else 1


def info(shards: str, json_file: Path | None, pictures: Path | None) -> None:
    """Say what a set holds; write it as JSON and as a sheet of pictures where asked for."""
    index = ShardIndex.open(shards)
    found = gather_info(index)
    print(printable(format_info(found)))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(json_file, asdict(found))
    if pictures is not None:
        count = save_pictures(index, pictures)
        print(f"{pictures}: {count} pictures")


if __name__ == "__main__":
    sys.exit(main())
