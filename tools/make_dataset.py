"""Make a data set (a labelled VOC devkit, an unlabelled pool, a labelled probe), or import one."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.annotations.record import read_class_names
from common.errors import UserError, run_command
from pipeline.datasets import packages, photos, procedural, shapes, voc_import
from pipeline.datasets.build import Card, build
from pipeline.datasets.options import SetOptions

_EXAMPLE = """examples:
  .venv/bin/python tools/make_dataset.py procedural data/scenes --num-pool 4000 --num-train 300
  .venv/bin/python tools/make_dataset.py photos data/photos --classes coarse --num-pool 4000
  .venv/bin/python tools/make_dataset.py voc data/voc0712 VOCtrainval_06-Nov-2007.tar \\
      VOCtest_06-Nov-2007.tar VOCtrainval_11-May-2012.tar
  .venv/bin/python tools/make_dataset.py voc data/parts my_devkit --classes bolt,nut,washer
"""
_PROJECT = Path(__file__).resolve().parents[1]


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    main_parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = main_parser.add_subparsers(
        dest="kind", required=True, metavar="{procedural,photos,voc}"
    )
    one = _add_kind(kinds, "procedural", "generated scenes of ten classes, no downloads")
    one.add_argument(
        "--num-classes",
        type=int,
        default=len(shapes.CLASSES),
        metavar="N",
        help=f"use the first N of {', '.join(shapes.CLASSES)} (default: all)",
    )
    one.add_argument(
        "--shifted-test",
        action="store_true",
        help="test and probe/val have materials and backgrounds of their own, not only shapes",
    )
    one.add_argument(
        "--material-habit",
        type=float,
        default=0.0,
        metavar="P",
        help="probability that a texture is one typical of the class (default: 0.0)",
    )
    two = _add_kind(kinds, "photos", "composites of photographs out of Debian packages")
    two.set_defaults(clutter=0.3)
    two.add_argument(
        "--classes",
        choices=(*photos.CLASS_SETS, "fine"),
        default="coarse",
        help=f"coarse: {', '.join(photos.CLASS_SETS['coarse'])}; medium: 5; fine: 11 classes "
        "(default: coarse)",
    )
    two.add_argument(
        "--split-seed",
        type=int,
        default=0,
        metavar="N",
        help="chooses which cut-outs and scenes are kept for the test (default: 0)",
    )
    two.add_argument(
        "--packages-dir",
        type=Path,
        metavar="DIR",
        help="folder with the .deb files, if they shall not be fetched",
    )
    two.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder for packages and pictures (default: $FA_CACHE/photos, else .cache/photos)",
    )
    _add_voc(kinds)
    return main_parser


def _add_voc(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the import of PASCAL VOC or of a set of its layout."""
    text = "PASCAL VOC 2007 and 2012, or a set of that layout: checked, with a dataset.json"
    one = kinds.add_parser(
        "voc",
        help=text,
        description=text,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = one.add_argument
    add("out", type=Path, metavar="OUT", help="folder to make")
    add(
        "sources",
        type=Path,
        nargs="+",
        metavar="SOURCE",
        help="the official tars, or folders that hold VOC2007 or VOC2012 (files are linked)",
    )
    add(
        "--classes",
        metavar="NAMES",
        help="a set of one's own: its class names, a,b,c or a file with one a line",
    )
    add("--train-split", default="train", help="list of a set of one's own (default: train)")
    add("--test-split", default="test", help="list of a set of one's own (default: test)")
    add(
        "--any-count",
        action="store_true",
        help="accept other than the official archives and numbers of pictures, with a warning: "
        "figures are then not comparable with published ones",
    )
    add("--num-workers", type=int, default=2, metavar="N", help="processes (default: 2)")
    add("--overwrite", action="store_true", help="replace a set made with other options")


def _add_kind(
    kinds: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str
) -> argparse.ArgumentParser:
    """Add one kind of set with the options that all share."""
    one = kinds.add_parser(
        name,
        help=text,
        description=text,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(one)
    return one


def _add_common(one: argparse.ArgumentParser) -> None:
    """Add the options that all sets share; the defaults stand in SetOptions."""
    default = SetOptions()
    one.add_argument("out", type=Path, metavar="OUT", help="folder to make")

    def number(name: str, text: str, kind: type = int, metavar: str = "N") -> None:
        field = name.removeprefix("--").replace("-", "_").replace("objects_per_image", "objects")
        value = getattr(default, field)
        one.add_argument(
            name,
            dest=field,
            type=kind,
            default=value,
            metavar=metavar,
            help=f"{text} (default: %(default)s)",
        )

    number("--num-pool", "unlabelled pictures for pretraining")
    number("--num-train", "labelled pictures for fine-tuning")
    number("--num-test", "labelled pictures for the evaluation")
    number("--num-probe-train", "single-object pictures, kNN reference")
    number("--num-probe-val", "single-object pictures, kNN queries")
    one.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        default=[default.short_side, default.long_side],
        metavar="PX",
        help="short and long side in pixels; the long one defaults to 5/4 of the "
        f"short one (default: {default.short_side} {default.long_side})",
    )
    number("--seed", "seed of everything random")
    share = "share of the short side"
    number("--min-object", f"smallest longer side of an object, {share}", float, "F")
    number("--max-object", f"largest longer side of an object, {share}", float, "F")
    number("--min-objects-per-image", "fewest objects in a labelled picture")
    number("--max-objects-per-image", "most objects in a labelled picture")
    number("--pool-min-object", "as --min-object, for pool and probe", float, "F")
    number("--pool-max-object", "as --max-object, for pool and probe", float, "F")
    number("--pool-min-objects-per-image", "fewest objects in a pool picture")
    number("--pool-max-objects-per-image", "most objects in a pool picture")
    number("--clutter", "amount of distractors, 0 is none", float, "F")
    number("--quality", "JPEG quality, 1..100")
    one.add_argument(
        "--num-workers",
        type=int,
        default=2,
        metavar="N",
        help="processes (default: 2); the pictures do not depend on it",
    )
    one.add_argument(
        "--overwrite", action="store_true", help="replace a set made with other options"
    )


def set_options(arguments: argparse.Namespace) -> SetOptions:
    """Check the shared options.

    Raises:
        UserError: If one of them cannot be meant.
    """
    sides = arguments.image_size
    if len(sides) > 2:
        raise UserError(f"--image-size has {len(sides)} values: give the short and the long side")
    if arguments.num_workers < 1:
        raise UserError(f"--num-workers is {arguments.num_workers}: give 1 or more")
    names = set(SetOptions.__dataclass_fields__) - {"short_side", "long_side"}
    long_side = sides[1] if len(sides) > 1 else round(sides[0] * 1.25)
    values = {name: getattr(arguments, name) for name in names}
    return SetOptions(short_side=sides[0], long_side=long_side, **values)


def make_procedural(arguments: argparse.Namespace) -> bool:
    """Make a generated set; see `build` for what is returned and raised."""
    options = set_options(arguments)
    classes = tuple(shapes.CLASSES)
    if not 2 <= arguments.num_classes <= len(classes):
        raise UserError(f"--num-classes is {arguments.num_classes}: give 2 to {len(classes)}")
    if not 0 <= arguments.material_habit <= 1:
        raise UserError(f"--material-habit is {arguments.material_habit}: give 0 to 1")
    if arguments.shifted_test and arguments.material_habit:
        raise UserError(
            f"--material-habit is {arguments.material_habit} together with --shifted-test: habits "
            "draw on all materials, so none would be kept for the test; give one of the two"
        )
    source = procedural.ProceduralSource(
        options,
        classes[: arguments.num_classes],
        arguments.shifted_test,
        arguments.material_habit,
    )
    own = "shape parameters" + (", materials and backgrounds" if arguments.shifted_test else "")
    details = {
        **options.as_dict(),
        "num_classes": arguments.num_classes,
        "shifted_test": arguments.shifted_test,
        "material_habit": arguments.material_habit,
        "generator_version": procedural.VERSION,
    }
    card = Card(
        arguments.out.name,
        "procedural",
        details,
        "CC0-1.0 (generated pictures)",
        f"Generated shapes; test and probe/val use {own} that train, pool and probe/train "
        "never use.",
    )
    return build(source, card, arguments.out, arguments.num_workers, arguments.overwrite)


def make_photos(arguments: argparse.Namespace) -> bool:
    """Make a set of photo composites; see `build` for what is returned and raised."""
    options = set_options(arguments)
    cache = arguments.cache or default_cache()
    library = packages.open_library(arguments.packages_dir, cache)
    names, seen, unseen = photos.split(library, arguments.classes, arguments.split_seed)
    source = photos.PhotoSource(options, names, library.root, seen, unseen)
    details = {
        **options.as_dict(),
        "classes": arguments.classes,
        "split_seed": arguments.split_seed,
        "packages": library.packages,
        "num_missing_pictures": len(library.missing),
        "generator_version": photos.VERSION,
    }
    if library.missing:
        print(f"{len(library.missing)} listed pictures are not in the packages and left out")
    notes = (
        f"Composites of {seen.num_cutouts() + unseen.num_cutouts()} cut-outs "
        f"({unseen.num_cutouts()} only in test and probe/val) on "
        f"{len(seen.backgrounds) + len(unseen.backgrounds)} photographs "
        f"({len(unseen.backgrounds)} only in test and probe/val); no claim about natural pictures."
    )
    licence = (
        "Pictures out of tuxpaint-stamps-default (GPL-2), tuxpaint-data (GPL-2) and "
        "gcompris-qt-data (GPL-3, Creative Commons, public domain, file by file); "
        "the packages' copyright files apply. Not part of this project."
    )
    card = Card(arguments.out.name, "photos", details, licence, notes)
    return build(source, card, arguments.out, arguments.num_workers, arguments.overwrite)


def make_voc(arguments: argparse.Namespace) -> bool:
    """Import a set; see `voc_import.import_voc` for what is returned and raised."""
    if arguments.num_workers < 1:
        raise UserError(f"--num-workers is {arguments.num_workers}: give 1 or more")
    classes = tuple(read_class_names(arguments.classes)) if arguments.classes else None
    lists = (arguments.train_split, arguments.test_split)
    if classes is None and lists != ("train", "test"):
        raise UserError("--train-split, --test-split: are for a set with --classes of its own")
    if classes is not None and arguments.any_count:
        raise UserError("--any-count: a set with --classes of its own has no official numbers")
    request = voc_import.Request(
        tuple(arguments.sources), classes, *lists, arguments.any_count, arguments.num_workers
    )
    return voc_import.import_voc(request, arguments.out, overwrite=arguments.overwrite)


def default_cache() -> Path:
    """Return the folder for what is fetched: $FA_CACHE/photos, else .cache/photos here."""
    chosen = os.environ.get("FA_CACHE")
    return (Path(chosen) if chosen else _PROJECT / ".cache") / "photos"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 (it went wrong) or 2 (wrong arguments or input)."""
    arguments = parser().parse_args(argv)
    arguments.out = arguments.out.resolve()

    def work() -> int:
        kinds = {"procedural": make_procedural, "photos": make_photos, "voc": make_voc}
        made = kinds[arguments.kind](arguments)
        outcome = "made" if made else "is there already with these options, kept"
        print(f"{arguments.out}: {outcome}")
        return 0

    return run_command(
        work,
        failures=(RuntimeError,),  # a worker that was killed
        when_interrupted="interrupted; run again to start anew",
    )


if __name__ == "__main__":
    sys.exit(main())
