"""Make a data set (a labelled VOC devkit, an unlabelled pool, a labelled probe), or import one."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import UserError, run_command
from pipeline.datasets.options import SetOptions, flag

_EXAMPLE = """examples:
  .venv/bin/python tools/make_dataset.py procedural data/scenes --num-pool 4000 --num-train 300
  .venv/bin/python tools/make_dataset.py photos data/photos --classes coarse --num-pool 4000
  .venv/bin/python tools/make_dataset.py voc data/voc0712 VOCtrainval_06-Nov-2007.tar \\
      VOCtest_06-Nov-2007.tar VOCtrainval_11-May-2012.tar
  .venv/bin/python tools/make_dataset.py voc data/parts my_devkit --classes bolt,nut,washer
"""
_PROJECT = Path(__file__).resolve().parents[1]
_SET_OPTIONS = {
    "num_pool": "unlabelled pictures for pretraining",
    "num_train": "labelled pictures for fine-tuning",
    "num_test": "labelled pictures for the evaluation",
    "num_probe_train": "single-object pictures, kNN reference",
    "num_probe_val": "single-object pictures, kNN queries",
    "seed": "seed of everything random",
    "min_object": "smallest longer side of an object, share of the short side",
    "max_object": "largest longer side of an object, share of the short side",
    "min_objects": "fewest objects in a labelled picture",
    "max_objects": "most objects in a labelled picture",
    "pool_min_object": "as --min-object, for pool and probe",
    "pool_max_object": "as --max-object, for pool and probe",
    "pool_min_objects": "fewest objects in a pool picture",
    "pool_max_objects": "most objects in a pool picture",
    "clutter": "amount of distractors, 0 is none",
    "quality": "JPEG quality, 1..100",
}
"""Field of `SetOptions` -> help text; the two sides of a picture have an option of their own."""


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    how = {"epilog": _EXAMPLE, "formatter_class": argparse.RawDescriptionHelpFormatter}
    main_parser = argparse.ArgumentParser(description=__doc__, **how)
    kinds = main_parser.add_subparsers(
        dest="kind", required=True, metavar="{procedural,photos,voc}"
    )

    def add_kind(name: str, make: Callable, text: str) -> argparse.ArgumentParser:
        one = kinds.add_parser(name, help=text, description=text, **how)
        one.set_defaults(make=make)
        add = one.add_argument
        add("out", type=Path, metavar="OUT", help="folder to make")
        text = "processes (default: 2); the pictures do not depend on it"
        add("--num-workers", type=int, default=2, metavar="N", help=text)
        add("--overwrite", action="store_true", help="replace a set made with other options")
        return one

    one = add_kind("procedural", make_procedural, "generated scenes of ten classes, no downloads")
    _add_set_options(one)
    add = one.add_argument
    add("--num-classes", type=int, metavar="N", help="use only the first N classes")
    text = "test and probe/val have materials and backgrounds of their own, not only shapes"
    add("--shifted-test", action="store_true", help=text)
    text = "probability that a texture is one typical of the class (default: 0.0)"
    add("--material-habit", type=float, default=0.0, metavar="P", help=text)

    one = add_kind("photos", make_photos, "composites of photographs out of Debian packages")
    _add_set_options(one)
    one.set_defaults(clutter=0.3)
    add = one.add_argument
    text = "coarse: animal, plant, artefact; medium: 5; fine: 11 classes (default: coarse)"
    add("--classes", choices=("coarse", "medium", "fine"), default="coarse", help=text)
    text = "chooses which cut-outs and scenes are kept for the test (default: 0)"
    add("--split-seed", type=int, default=0, metavar="N", help=text)
    text = "folder with the .deb files, if they shall not be fetched"
    add("--packages-dir", type=Path, metavar="DIR", help=text)
    text = "folder for packages and pictures (default: $FA_CACHE/photos, else .cache/photos)"
    add("--cache", type=Path, metavar="DIR", help=text)

    text = "PASCAL VOC 2007 and 2012, or a set of that layout: checked, with a dataset.json"
    add = add_kind("voc", make_voc, text).add_argument
    text = "the official tars, or folders that hold VOC2007 or VOC2012 (files are linked)"
    add("sources", type=Path, nargs="+", metavar="SOURCE", help=text)
    text = "a set of one's own: its class names, a,b,c or a file with one a line"
    add("--classes", metavar="NAMES", help=text)
    add("--train-split", default="train", help="list of a set of one's own (default: train)")
    add("--test-split", default="test", help="list of a set of one's own (default: test)")
    text = (
        "accept other than the official archives and numbers of pictures, with a warning: "
        "figures are then not comparable with published ones"
    )
    add("--any-count", action="store_true", help=text)
    return main_parser


def _add_set_options(one: argparse.ArgumentParser) -> None:
    """Add the options of both generators; their defaults stand in `SetOptions`."""
    default = SetOptions()
    for field, text in _SET_OPTIONS.items():
        value = getattr(default, field)
        one.add_argument(
            flag(field),
            dest=field,
            type=type(value),
            default=value,
            metavar="F" if isinstance(value, float) else "N",
            help=f"{text} (default: %(default)s)",
        )
    sides = [default.short_side, default.long_side]
    text = "short and long side in pixels; the long one defaults to 5/4 of the short one (default: "
    text += " ".join(map(str, sides)) + ")"
    one.add_argument("--image-size", type=int, nargs="+", default=sides, metavar="PX", help=text)


def set_options(arguments: argparse.Namespace) -> SetOptions:
    """Check the options of both generators.

    Raises:
        UserError: If one of them cannot be meant.
    """
    short, *rest = arguments.image_size
    if len(rest) > 1:
        raise UserError(f"--image-size has {1 + len(rest)} values: give the short and long side")
    values = {name: getattr(arguments, name) for name in _SET_OPTIONS}
    return SetOptions(
        short_side=short, long_side=rest[0] if rest else round(short * 1.25), **values
    )


def make_procedural(arguments: argparse.Namespace) -> bool:
    """Make a generated set; see `build` for what is returned and raised."""
    from pipeline.datasets import procedural, shapes
    from pipeline.datasets.build import Card, build

    options = set_options(arguments)
    classes = tuple(shapes.CLASSES)
    if arguments.num_classes is None:
        arguments.num_classes = len(classes)
    if not 2 <= arguments.num_classes <= len(classes):
        raise UserError(f"--num-classes is {arguments.num_classes}: give 2 to {len(classes)}")
    if not 0 <= arguments.material_habit <= 1:
        raise UserError(f"--material-habit is {arguments.material_habit}: give 0 to 1")
    if arguments.shifted_test and arguments.material_habit:
        raise UserError(
            f"--material-habit is {arguments.material_habit} together with --shifted-test: habits "
            "draw on all materials, so none would be kept for the test; give one of the two"
        )
    names = ("num_classes", "shifted_test", "material_habit")
    own = {name: getattr(arguments, name) for name in names}
    source = procedural.ProceduralSource(
        options, classes[: arguments.num_classes], arguments.shifted_test, arguments.material_habit
    )
    kept = "shape parameters" + (", materials and backgrounds" if arguments.shifted_test else "")
    card = Card(
        arguments.out.name,
        "procedural",
        options.as_dict() | own | {"generator_version": procedural.VERSION},
        "CC0-1.0 (generated pictures)",
        f"Generated shapes; test and probe/val use {kept} that train, pool and probe/train "
        "never use.",
    )
    return build(source, card, arguments.out, arguments.num_workers, arguments.overwrite)


def make_photos(arguments: argparse.Namespace) -> bool:
    """Make a set of photo composites; see `build` for what is returned and raised."""
    from pipeline.datasets import packages, photos
    from pipeline.datasets.build import Card, build

    options = set_options(arguments)
    library = packages.open_library(arguments.packages_dir, arguments.cache or default_cache())
    names, seen, unseen = photos.split(library, arguments.classes, arguments.split_seed)
    source = photos.PhotoSource(options, names, library.root, seen, unseen)
    own = {
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
    card = Card(arguments.out.name, "photos", options.as_dict() | own, licence, notes)
    return build(source, card, arguments.out, arguments.num_workers, arguments.overwrite)


def default_cache() -> Path:
    """Return the folder for what is fetched: $FA_CACHE/photos, else .cache/photos here."""
    return Path(os.environ.get("FA_CACHE") or _PROJECT / ".cache") / "photos"


def make_voc(arguments: argparse.Namespace) -> bool:
    """Import a set; see `voc_import.import_voc` for what is returned and raised."""
    from common.annotations.record import read_class_names
    from pipeline.datasets import voc_import

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 (it went wrong) or 2 (wrong arguments or input)."""
    options = parser().parse_args(arguments)
    options.out = options.out.resolve()

    def work() -> int:
        if options.num_workers < 1:
            raise UserError(f"--num-workers is {options.num_workers}: give 1 or more")
        made = options.make(options)
        print(f"{options.out}: {'made' if made else 'is there already with these options, kept'}")
        return 0

    return run_command(
        work,
        failures=(RuntimeError,),  # a worker that was killed
        when_interrupted="interrupted; run again to start anew",
    )


if __name__ == "__main__":
    sys.exit(main())
