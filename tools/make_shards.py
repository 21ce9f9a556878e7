r"""Pack pictures into WebDataset shards with an index; verify shards; say what they hold.

SOURCE is a folder of pictures at any depth (ImageNet-style class folders: --labels folders), or a
VOC devkit.

Examples:
  .venv/bin/python tools/make_shards.py data/scenes/pool data/shards
  .venv/bin/python tools/make_shards.py imagenet data/imagenet --split train --labels folders \
      --resize-short 256
  .venv/bin/python tools/make_shards.py imagenet data/imagenet --split train \
      --submitit slurm --num-tasks 16 --slurm-partition cpu --num-workers 8
  .venv/bin/python tools/make_shards.py data/shards --info

Exit status: 0 done; 1 it went wrong, or --verify reports a fault; 2 wrong arguments or input.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from common import errors
from common.files import check_out_folder, write_json
from pipeline.datasets.importers import open_source
from pretrain.data.pack import Cluster, ShardOptions, SourcePicture, make_plan, write_shards
from pretrain.data.shard_info import format_info, gather_info, verify_shards
from pretrain.data.shards import ShardIndex


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    default = ShardOptions()
    main_parser = errors.command_parser(__doc__)
    add = main_parser.add_argument
    add("source", metavar="SOURCE", help="pictures; with --verify, --info: the shards")
    add("out", type=Path, nargs="?", metavar="OUT", help="folder for the shards")
    add("--split", metavar="NAME", help="list of a VOC devkit (train, trainval, ..) or sub-folder")
    add("--labels", default="none", metavar="{folders,none,LIST}",
        help="none (default); folders: the first folder below SOURCE is a picture's class; or a "
        "text file with NAME CLASS in each line")  # fmt: skip
    add("--max-samples-per-shard", type=int, default=default.max_samples_per_shard, metavar="N",
        help="most samples in a shard (default: %(default)s)")  # fmt: skip
    add("--shard-size-mb", type=float, default=default.shard_size_mb, metavar="MB",
        help="about the largest shard, MB (default: %(default)g)")  # fmt: skip
    add("--resize-short", type=int, metavar="S", help="shrink pictures to this short side, pixels")
    add("--quality", type=int, default=default.quality, metavar="Q",
        help="JPEG quality of shrunk pictures (default: %(default)s)")  # fmt: skip
    order = main_parser.add_mutually_exclusive_group()
    order.add_argument("--shuffle-seed", type=int, default=default.shuffle_seed, metavar="N",
                       help="seed of the order over all shards (default: %(default)s)")  # fmt: skip
    order.add_argument("--no-shuffle", action="store_const", const=None, dest="shuffle_seed",
                       help="keep the order of names")  # fmt: skip
    add("--part", type=_part, default=(0.0, 1.0), metavar="LOW:HIGH",
        help="pack a part: 0:0.1 and 0.1:1 are a random tenth and the rest")  # fmt: skip
    add("--num-workers", type=errors.whole(0), metavar="N",
        help="processes; the shards do not depend on it (default: all cores; with --submitit: 1 "
        "per task)")  # fmt: skip
    add("--max-bad", type=errors.whole(0), default=0, metavar="N",
        help="leave out and list up to N pictures that do not decode (default: 0)")  # fmt: skip
    add("--overwrite", action="store_true", help="throw away other shards in OUT first")
    add("--verify", action="store_true", help="check sizes, SHA-256 and samples against the index")
    add("--check", nargs="?", const="all", choices=("all", "settings"),
        help="look at SOURCE, say what would be packed; settings: not at SOURCE")  # fmt: skip
    add("--info", action="store_true", help="say what a set holds: counts, sizes, classes")
    add("--json", type=errors.json_file, nargs="?", const=Path("-"), metavar="FILE",
        help="with --info: write it as JSON too; with --check: say it as JSON")  # fmt: skip
    group = main_parser.add_argument_group("several tasks, through submitit")
    add = group.add_argument
    add("--submitit", choices=("local", "slurm"), help="where tasks run; OUT must be shared")
    add("--num-tasks", type=int, metavar="N", help="tasks, each makes a share of the shards")
    add("--slurm-partition", metavar="NAME", help="partition of the tasks")
    add("--slurm-time-minutes", type=int, metavar="MIN",
        help="time limit of a task; at its end it is queued again (default: 240)")  # fmt: skip
    add("--slurm-mem-gb", type=float, metavar="GB", help="memory of a task")
    errors.add_slurm_option(group)
    return main_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    return errors.run_command(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Pack, verify, describe; returns the exit status."""
    errors.require(options.info or options.check or not options.json, "--json needs --info")
    errors.require(options.check or options.json != Path("-"), "--info --json needs a FILE")
    num_workers = options.num_workers
    if num_workers is None:
        num_workers = 1 if options.submitit else os.cpu_count() or 1
    if options.out is not None:
        pack(options, num_workers)
        if options.check:
            return 0
    elif not (options.verify or options.info):
        raise errors.UserError(
            "OUT is missing; give SOURCE OUT, or SHARDS --verify or --info (--help)"
        )
    shards = str(options.out or options.source)
    status = verify(shards, num_workers) if options.verify else 0
    if options.info:
        index = ShardIndex.open(shards)
        info = gather_info(index)
        print(errors.printable(format_info(info)))
        if options.json is not None:
            write_json(options.json, info)
    return status


def pack(options: argparse.Namespace, num_workers: int) -> None:
    """Write the shards and say what was done."""
    cluster = cluster_of(options)
    shard_options = ShardOptions(**{x.name: getattr(options, x.name) for x in fields(ShardOptions)})
    if options.check == "settings":
        errors.print_check({}, as_json=options.json is not None)
        return
    check_out_folder(options.out)
    if not Path(options.source).exists() and options.out.is_dir() and any(options.out.iterdir()):
        swapped = f"make_shards.py {options.out} {options.source}"
        remedy = f"give the pictures first, then the folder for the shards: {swapped}"
        raise errors.UserError(errors.no_such_file(options.source, remedy, "folder"))
    source = open_source(options.source, split=options.split, labels=options.labels)
    chosen = [SourcePicture(*one) for one in source.pictures if is_in_part(one[1], options.part)]
    errors.require(len(chosen) > 0, f"--part {options.part}: holds no picture of {options.source}")
    if options.check:
        num_bytes = sum(plan.estimated_bytes for plan in make_plan(chosen, shard_options))
        facts = {"num_pictures": len(chosen), "disk_bytes": num_bytes}
        errors.print_check(facts, as_json=options.json is not None)
        return
    text = f"{options.source}: {source.kind}, {len(chosen)} pictures, {source.num_ignored} other"
    print(errors.printable(f"{text} files; {source.about_labels}"), flush=True)

    report = write_shards(
        chosen,
        options.out,
        options=shard_options,
        classes=None if source.classes is None else list(source.classes),
        num_workers=num_workers,
        max_bad=options.max_bad,
        overwrite=options.overwrite,
        cluster=cluster,
    )
    text = f"{options.out}: {report.num_samples} samples in {report.num_shards} shards, "
    text += f"{report.num_bytes / 1e6:.1f} MB"
    if report.num_shards_kept:
        text += f" ({report.num_shards_kept} shards were finished before)"
    if report.skipped:
        reasons = "\n".join(f"  {item['reason']}" for item in report.skipped)
        text += f"\nleft out {len(report.skipped)} pictures (also listed in index.json):\n{reasons}"
    print(errors.printable(text))


def is_in_part(name: str, part: tuple[float, float]) -> bool:
    """Whether a picture belongs to a part, by the hash of its name: parts do not overlap."""
    low, high = part
    place = int.from_bytes(hashlib.blake2b(name.encode(errors="replace"), digest_size=6).digest())
    return low <= place / 2**48 < high


def _part(text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    if not 0 <= float(low) < float(high) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give LOW:HIGH with 0 <= LOW < HIGH <= 1")
    return float(low), float(high)


def cluster_of(options: argparse.Namespace) -> Cluster | None:
    """Where tasks run; None to work in this process."""
    given = [name for name in vars(options) if name.startswith("slurm_") and getattr(options, name)]
    if given and options.submitit != "slurm":
        raise errors.UserError(f"--{given[0].replace('_', '-')} needs --submitit slurm")
    if options.submitit is None:
        errors.require(options.num_tasks is None, "--num-tasks needs --submitit local or slurm")
        return None
    errors.require(
        options.num_tasks is not None, f"--submitit {options.submitit} needs --num-tasks N"
    )
    return Cluster(
        kind=options.submitit,
        num_tasks=options.num_tasks,
        partition=options.slurm_partition,
        time_minutes=240 if options.slurm_time_minutes is None else options.slurm_time_minutes,
        mem_gb=options.slurm_mem_gb,
        options=dict(options.slurm_option),
    )


def verify(shards: str, num_workers: int) -> int:
    """Check shards and say what is wrong; returns the exit status."""
    errors.require(
        "://" not in shards,
        f"{shards}: --verify reads every byte of a local folder; copy the set first",
    )
    errors.require(
        Path(shards).is_dir(), errors.no_such_file(shards, "give a folder of shards", "folder")
    )
    errors.require(
        (Path(shards) / "index.json").is_file(),
        f"{shards}: has no index.json to verify against; tools/make_shards.py PICTURES SHARDS "
        "makes shards with one",
    )
    problems = verify_shards(Path(shards), num_workers=num_workers)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{shards}: {f'{len(problems)} faults' if problems else 'all as the index says'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(errors.run_or_check_each(main))
