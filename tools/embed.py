#!/usr/bin/env python3
r"""Features of pictures: to search, to find duplicates before training, to see what was learnt.

Examples:
  .venv/bin/python tools/embed.py runs/first my_pictures --out features.npz
  .venv/bin/python tools/embed.py backbone.pkl 'photos/**/*.jpg' --out features.npz \
      --neighbours sheet.jpg --duplicates duplicates.json
  .venv/bin/python tools/embed.py random:R18 data/shards --out random.npz

CHECKPOINT is a run's folder, a checkpoint or weights in any layout that tools/convert_to_d2.py
reads, or random: with R18, R34, R50, R101, thin_R50. PICTURES are files, folders, globs, and shards
(tars, folders and patterns of tars). numpy.load(OUT) gives features [n, d] and names [n].
Exit status: 0 done, 1 it went wrong, 2 wrong arguments or input.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import errors
from common.resnet import add_reading_options

_ENDINGS = {"out": (".npz",), "neighbours": (".jpg", ".jpeg"), "duplicates": (".json",)}
_NUM_QUERIES, _NUM_NEIGHBOURS = 10, 8


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be, before the imports that take seconds.

    Raises:
        UserError: Naming the argument.
    """
    threshold = arguments.threshold
    errors.require(
        threshold is None or arguments.duplicates is not None, "--threshold: needs --duplicates"
    )
    errors.require(threshold is None or 0.5 <= threshold <= 1,
            f"--threshold {threshold}: give a number from 0.5 to 1")  # fmt: skip
    written: dict[Path, str] = {}
    for name, endings in _ENDINGS.items():
        path = getattr(arguments, name)
        if path is None:
            continue
        errors.require(
            path.suffix in endings, f"--{name} {path}: end the name in {' or '.join(endings)}"
        )
        for file in (path, *([path.with_suffix(".json")] if name == "neighbours" else [])):
            errors.require(not file.is_dir(), f"--{name} {file}: is a folder; give a file name")
            other = written.setdefault(file.resolve(), name)
            errors.require(other == name, f"--{name} {path}: writes {file}, as --{other} does")


def run(arguments: argparse.Namespace) -> None:
    """Compute and write everything, and say what was done."""
    check_arguments(arguments)

    import torch

    from common.backbone import reading_of
    from common.threads import choose_threads
    from pretrain import collectives as dist
    from pretrain.evaluation import embedding
    from pretrain.evaluation.linear.config import LinearConfig
    from pretrain.evaluation.linear.features import RANDOM, FrozenBackbone
    from pretrain.load import checkpoint_of

    num_threads = choose_threads(arguments.threads or 0) or torch.get_num_threads()
    torch.set_num_threads(num_threads)
    source = arguments.checkpoint
    if not source.startswith(RANDOM):
        source = str(checkpoint_of(Path(source)))
    backbone = FrozenBackbone(
        source,
        LinearConfig(image_size=arguments.image_size),
        device=dist.choose_device(arguments.device),
        **reading_of(arguments),
    )
    about: dict[str, Any] = {
        "model": backbone.description["name"],
        "arch": str(backbone.model.arch),
        "num_features": backbone.model.output_dim,
        "weights_hash": backbone.description["weights_hash"],
        **backbone.view,
    }
    if arguments.check == "settings":
        errors.print_check(about, as_json=arguments.json)
        return
    pictures = embedding.list_pictures(arguments.pictures, arguments.out)
    sheet = arguments.neighbours
    named = {picture.name for picture in pictures.pictures}
    errors.require(sheet is None or errors.printable(str(sheet)) not in named,
            f"--neighbours {sheet}: is one of the pictures; choose another name")  # fmt: skip
    if arguments.check:
        counts = {"num_pictures": len(named), "num_bad": len(pictures.bad)}
        errors.print_check(
            about | counts | {"num_others": pictures.num_others}, as_json=arguments.json
        )
        return

    began = time.perf_counter()
    found = embedding.embed(
        backbone,
        pictures,
        batch_size=arguments.batch,
        num_threads=num_threads,
        max_bad=arguments.max_bad,
        with_prints=arguments.duplicates is not None,
    )
    seconds = time.perf_counter() - began
    embedding.save(arguments.out, found, backbone)
    num, dim = found.features.shape
    text = f"{num} pictures, {dim} features each, in {seconds:.1f} s ({num / seconds:.0f} a second)"
    if found.bad or pictures.num_others:
        text += f"; left out: {len(found.bad)} bad, {pictures.num_others} files of other kinds"
    print(text)
    print(errors.printable(f"wrote {arguments.out}"))
    if sheet is not None:
        embedding.save_neighbours(
            sheet, found, num_queries=_NUM_QUERIES, num_neighbours=_NUM_NEIGHBOURS,
            seed=arguments.seed,
        )  # fmt: skip
        print(errors.printable(f"wrote {sheet} and {sheet.with_suffix('.json').name}"))
    if arguments.duplicates is not None:
        report = embedding.save_duplicates(arguments.duplicates, found, arguments.threshold)
        print(f"{report['num_groups']} groups of duplicates with {report['num_pictures']} pictures")
        print(errors.printable(f"wrote {arguments.duplicates}"))


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 done, 1 it went wrong, 2 wrong arguments or input.
    """
    parser = errors.command_parser(__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="weights, see below")
    add("pictures", nargs="+", metavar="PICTURES", help="files, folders, globs, shards")
    add("--out", type=Path, required=True, metavar="FILE.npz", help="file for the features")
    add("--neighbours", type=Path, metavar="SHEET.jpg", help="some pictures, each with its nearest "
        "ones and their cosine; SHEET.json holds the names")  # fmt: skip
    add("--duplicates", type=Path, metavar="FILE.json",
        help="groups of pictures that are the same or nearly")  # fmt: skip
    add("--threshold", type=float, metavar="T", help="of --duplicates: lowest correlation of two "
        "thumbnails (default: 0.99)")  # fmt: skip
    add("--seed", type=errors.whole(0), default=0, help="of the choice for --neighbours (0)")
    add("--batch", type=errors.whole(1), default=64, metavar="N",
        help="pictures per forward pass (64)")  # fmt: skip
    add("--image-size", type=int, default=0, metavar="N", help="side of the central square in "
        "pixels (default: as in the pretraining, else 224)")  # fmt: skip
    add("--max-bad", type=errors.whole(0), default=0, metavar="N",
        help="leave out up to N pictures that do not decode (default: 0)")  # fmt: skip
    add_reading_options(parser)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")
    add("--threads", type=errors.whole(1), metavar="N", help="CPU threads (default: free cores)")
    errors.add_check_options(parser)
    arguments = parser.parse_args(argv)
    work = errors.memory_remedy("lower --batch, or use --device cpu")(partial(run, arguments))
    return errors.run_command(work, when_interrupted="stopped; the same command starts anew")


if __name__ == "__main__":
    sys.exit(errors.run_or_check_each(main))
