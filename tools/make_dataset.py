r"""Make a data set (a labelled VOC devkit, an unlabelled pool, a labelled probe), or import one.

Examples:
  .venv/bin/python tools/make_dataset.py procedural data/scenes --num-pool 4000 --num-train 300
  .venv/bin/python tools/make_dataset.py photos data/photos --classes coarse --num-pool 4000
  .venv/bin/python tools/make_dataset.py letters data/letters
  .venv/bin/python tools/make_dataset.py import data/birds labelled/birds --show birds.jpg
  .venv/bin/python tools/make_dataset.py voc data/voc0712 VOCtrainval_06-Nov-2007.tar \
      VOCtest_06-Nov-2007.tar VOCtrainval_11-May-2012.tar
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from common import errors
from common.annotations.record import FORMATS, SetChoice, read_class_names, read_set
from common.files import cache_folder, is_below
from pipeline.datasets.sets import Card, SetOptions, flag

if TYPE_CHECKING:
    from pipeline.datasets.scene import SceneSource

_PROJECT = Path(__file__).resolve().parents[1]


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    # fmt: off
    main_parser = errors.command_parser(__doc__)
    names = "{procedural,photos,letters,fashion,voc,import}"
    kinds = main_parser.add_subparsers(required=True, metavar=names)

    def add_kind(
        name: str, make: Callable, text: str, *, is_generated: bool, without: str = "_side"
    ) -> Callable:
        one = kinds.add_parser(name, help=text, description=text)
        one.set_defaults(make=make)
        add = one.add_argument
        add("out", type=Path, metavar="OUT", help="folder to make")
        add("--num-workers", type=errors.whole(1), default=2, metavar="N",
            help="processes (default: 2); the pictures do not depend on it")
        add("--overwrite", action="store_true", help="replace a set made with other options")
        errors.add_check_options(one)
        if not is_generated:
            return add
        # The options of all generators, with the defaults of `SetOptions`.
        default = SetOptions()
        for option in fields(SetOptions):
            if not option.name.endswith("_side") and not option.name.startswith(without):
                text, value = option.metadata["help"], getattr(default, option.name)
                add(flag(option), dest=option.name, type=type(value), default=value,
                    metavar="F" if isinstance(value, float) else "N",
                    help=f"{text} (default: %(default)s)")
        add("--image-size", type=int, nargs="+", metavar="PX",
            default=[default.short_side, default.long_side],
            help="short and long side in pixels; the long one defaults to 5/4 of the short one "
            f"(default: {default.short_side} {default.long_side})")
        return add

    def add_packages(add: Callable, name: str, content: str) -> None:
        add("--packages-dir", type=Path, metavar="DIR",
            help="folder with the .deb files, if they shall not be fetched")
        add("--cache", type=Path, metavar="DIR", help=f"folder for packages and {content} "
            f"(default: $FA_CACHE/{name}, else .cache/{name})")

    text = "generated scenes of six classes, no downloads"
    add = add_kind("procedural", make_procedural, text, is_generated=True)
    add("--num-classes", type=int, default=6, metavar="N", help="use the first N (default: 6)")
    add("--material-habit", type=float, default=0.0, metavar="P",
        help="probability that a texture is one typical of the class (default: 0.0)")

    text = "composites of photographs out of Debian packages"
    add = add_kind("photos", make_photos, text, is_generated=True)
    add("--classes", choices=("coarse", "medium", "fine"), default="coarse",
        help="coarse: animal, plant, artefact; medium: 5; fine: 11 classes (default: coarse)")
    add("--split-seed", type=int, default=0, metavar="N",
        help="chooses which cut-outs and scenes are kept for the test (default: 0)")
    add_packages(add, "photos", "pictures")
    kinds.choices["photos"].set_defaults(clutter=0.3)

    text = "letters of many fonts out of Debian packages; scenes of them with boxes"
    add = add_kind("letters", make_letters, text, is_generated=True, without="pool_")
    add("--letters", default=ascii_uppercase, metavar="ABC",
        help="the classes, in this order (default: all capitals)")
    add("--letter-size", type=int, default=40, metavar="PX",
        help="side of the pictures of pool and probe (default: 40)")
    add("--fonts-dir", type=Path, metavar="DIR",
        help="take all fonts below this folder, as those of this machine, instead of the packages")
    add_packages(add, "letters", "fonts")
    kinds.choices["letters"].set_defaults(
        num_pool=14_144, num_probe_train=3068, num_probe_val=2184,
        image_size=[128, 160], max_objects=5, max_object=0.6,
    )

    text = "Fashion-MNIST out of a Debian package: pool and probe, no boxes"
    add = add_kind("fashion", make_fashion, text, is_generated=False)
    for option, value in {"pool": 60_000, "probe-train": 2000, "probe-val": 1000}.items():
        add(f"--num-{option}", type=int, default=value, metavar="N", help=f"(default: {value})")
    add("--seed", type=int, default=0, metavar="N", help="of the choice (default: 0)")

    text = "PASCAL VOC 2007 and 2012: checked, with a dataset.json"
    add = add_kind("voc", make_voc, text, is_generated=False)
    add("sources", type=Path, nargs="+", metavar="SOURCE",
        help="the official tars, or folders that hold VOC2007 or VOC2012 (files are linked)")

    text = "labelled pictures as annotation tools write them: VOC, COCO, YOLO, LabelImg"
    add = add_kind("import", make_import, text, is_generated=False)
    add("source", type=Path, metavar="SOURCE", help="their folder")
    add("--format", choices=FORMATS.names(), help="of the source (default: recognised)")
    add("--classes", metavar="NAMES", help="in order, a,b,c or a file with one a line; objects of "
        "others are left out (default: all)")
    add("--val-share", type=float, default=0.2, metavar="F",
        help="of the pictures, where the source has no lists of its own (default: 0.2)")
    add("--seed", type=int, default=0, metavar="N", help="of that choice (default: 0)")
    add("--train-split", metavar="LISTS", help="lists to train on, joined by + (default: train)")
    add("--test-split", metavar="LIST", help="the list to evaluate (default: test, else val)")
    add("--exif", choices=("auto", "stored"), default="auto",
        help="boxes of pictures with an EXIF orientation: as tools/train_voc.sh has it")
    add("--max-left-out", type=int, default=0, metavar="N",
        help="leave out up to N faulty pictures and objects (default: 0, stop)")
    add("--show", type=Path, metavar="JPG", help="draw labelled samples")
    # fmt: on
    return main_parser


def set_options(arguments: argparse.Namespace) -> SetOptions:
    """Check the options of both generators.

    Raises:
        UserError: If one of them cannot be meant.
    """
    short, *rest = arguments.image_size
    num = 1 + len(rest)
    errors.require(num <= 2, f"--image-size has {num} values: give the short and long side")
    default = SetOptions()
    values = {x.name: getattr(arguments, x.name, getattr(default, x.name)) for x in fields(default)}
    values |= {"short_side": short, "long_side": rest[0] if rest else round(short * 1.25)}
    return SetOptions(**values)


def _print_plan(options: SetOptions, *, as_json: bool) -> bool:
    """What --check says of a generated set; a JPEG of quality 92 takes about 0.4 bytes a pixel."""
    total = sum(options.counts().values())
    num_bytes = round(0.4 * options.short_side * options.long_side * total)
    facts = {"num_pool": options.num_pool, "num_pictures": total, "disk_bytes": num_bytes}
    return errors.print_check(facts, as_json=as_json)


def make_procedural(arguments: argparse.Namespace) -> bool:
    """Make a generated set; see `build` for what is returned and raised."""
    from pipeline.datasets import procedural, shapes

    options, classes = set_options(arguments), tuple(shapes.CLASSES)
    num, habit = arguments.num_classes, arguments.material_habit
    errors.require(2 <= num <= len(classes), f"--num-classes is {num}: give 2 to {len(classes)}")
    errors.require(0 <= habit <= 1, f"--material-habit is {habit}: give 0 to 1")
    if arguments.check:
        return _print_plan(options, as_json=arguments.json)
    more = {"num_classes": num, "material_habit": habit}
    source = procedural.ProceduralSource(options, classes[:num], habit)
    notes = (
        "Generated shapes; test and probe/val use shape parameters that train, pool and "
        "probe/train never use."
    )
    licence = "CC0-1.0 (generated pictures)"
    return _build(source, arguments, procedural.VERSION, asdict(options) | more, licence, notes)


def make_photos(arguments: argparse.Namespace) -> bool:
    """Make a set of photo composites; see `build` for what is returned and raised."""
    from pipeline.datasets import photos

    options = set_options(arguments)
    if arguments.check:
        return _print_plan(options, as_json=arguments.json)
    library = photos.open_library(arguments.packages_dir, arguments.cache or cache_of("photos"))
    names, seen, unseen = photos.split(library, arguments.classes, arguments.split_seed)
    if library.num_missing:
        print(f"{library.num_missing} listed pictures are not in the packages and left out")
    grounds = len(seen.backgrounds), len(unseen.backgrounds)
    more = {
        "classes": arguments.classes,
        "split_seed": arguments.split_seed,
        "packages": library.packages,
        "num_missing_pictures": library.num_missing,
    }
    notes = (
        f"Composites of {seen.num_cutouts() + unseen.num_cutouts()} cut-outs "
        f"({unseen.num_cutouts()} only in test and probe/val) on {sum(grounds)} photographs "
        f"({grounds[1]} only in test and probe/val); no claim about natural pictures."
    )
    source = photos.PhotoSource(options, names, library.root, seen, unseen)
    used = asdict(options) | more
    return _build(source, arguments, photos.VERSION, used, photos.LICENCE, notes)


def make_letters(arguments: argparse.Namespace) -> bool:
    """Make a set of letters; see `build` for what is returned and raised."""
    from pipeline.datasets import letters

    options, names = set_options(arguments), tuple(arguments.letters)
    is_good = 2 <= len(names) == len(set(names)) and set(names) <= set(ascii_uppercase)
    errors.require(is_good, f"--letters {arguments.letters}: give two or more of A to Z, each once")
    side = arguments.letter_size
    errors.require(16 <= side <= 1024, f"--letter-size is {side}: give 16 to 1024")
    errors.require(
        arguments.fonts_dir is None or arguments.packages_dir is None,
        "--fonts-dir, --packages-dir: give one of them",
    )
    if arguments.check:
        return _print_plan(options, as_json=arguments.json)
    fonts = letters.open_fonts(
        arguments.fonts_dir, arguments.packages_dir, arguments.cache or cache_of("letters")
    )
    files = letters.split(fonts, options.seed)
    left_out = ", ".join(f"{num} {why}" for why, num in fonts.left_out.items())
    print(f"{len(fonts.files)} fonts; left out: {left_out or 'none'}")
    counts = {part: len(names) for part, names in files.items()}
    more = {"letters": arguments.letters, "letter_size": side, "fonts": fonts.digest}
    used = {name: x for name, x in asdict(options).items() if not name.startswith("pool_")}
    notes = (
        f"Letters of {len(fonts.files)} fonts, {counts['pool']} in the pool, {counts['train']} in "
        f"train and probe/train, {counts['test']} in test and probe/val; families are not shared "
        f"between these. Font files left out: {left_out or 'none'}."
    )
    source = letters.LetterSource(options, names, root=fonts.root, files=files, picture_side=side)
    return _build(source, arguments, letters.VERSION, used | more, letters.LICENCE, notes)


def _build(
    source: "SceneSource", arguments: argparse.Namespace, version: int, options: dict[str, Any],
    licence: str, notes: str,
) -> bool:  # fmt: skip
    """Write a generated set with its card."""
    from pipeline.datasets.scene import build

    options["generator_version"] = version
    card = Card(arguments.out.name, source.kind, options, licence, notes)
    return build(source, card, arguments.out, arguments.num_workers, arguments.overwrite)


def make_fashion(arguments: argparse.Namespace) -> bool:
    """Take Fashion-MNIST's pictures out of its package; see `make_set` for what is returned."""
    from pipeline.datasets.importers import FASHION_COUNTS, import_fashion

    counts = {name: getattr(arguments, name) for name in FASHION_COUNTS}
    for name, most in FASHION_COUNTS.items():
        option = "--" + name.replace("_", "-")
        errors.require(
            10 <= counts[name] <= most, f"{option} is {counts[name]}: give 10 to {most:,}"
        )
    if arguments.check:
        return errors.print_check(counts, as_json=arguments.json)
    return import_fashion(
        arguments.out, cache_of("fashion_mnist"), counts, arguments.seed, arguments.overwrite
    )


def cache_of(name: str) -> Path:
    """Return the folder for what is fetched: $FA_CACHE/NAME, else .cache/NAME here."""
    return cache_folder(_PROJECT) / name


def make_voc(arguments: argparse.Namespace) -> bool:
    """Import a set; see `import_voc` for what is returned and raised."""
    from pipeline.datasets.importers import import_voc

    errors.require(
        not arguments.check, "--check: is for generated sets; an import checks as it goes"
    )
    _check_sources(arguments.out, arguments.sources)
    return import_voc(arguments.sources, arguments.out, arguments.num_workers, arguments.overwrite)


def _check_sources(out: Path, sources: Sequence[Path]) -> None:
    """Refuse sources that would be removed with the set that `out` holds."""
    for source in sources:
        wrong = f"{source}: lies in {out}, which is replaced as a whole; give another OUT"
        errors.require(not is_below(source, out), wrong)


def make_import(arguments: argparse.Namespace) -> bool:
    """Import labelled pictures; see `import_labelled` for what is returned and raised."""
    from pipeline.datasets.labelled import describe, import_labelled, write_sheet

    source = arguments.source
    _check_sources(arguments.out, [source])
    errors.require(not is_below(arguments.out, source), f"{arguments.out}: lies in {source}; give "
            "another folder")  # fmt: skip
    choice = SetChoice(
        arguments.format,
        classes=tuple(read_class_names(arguments.classes)) if arguments.classes else None,
        train_split=arguments.train_split,
        test_split=arguments.test_split,
        exif=arguments.exif,
        max_left_out=arguments.max_left_out,
        val_share=arguments.val_share,
        split_seed=arguments.seed,
        all_lists=True,
        decodes=True,
    )
    data = read_set(source, choice)
    if arguments.check:
        facts = {
            "classes": list(data.classes),
            "splits": {x.name: len(x.pictures) for x in (*data.train, data.test, *data.others)},
            "repaired": dict(data.repaired),
            "left_out": dict(data.left_out),
        }
        return errors.print_check(facts, as_json=arguments.json)
    print("\n".join(describe(data)))
    made = import_labelled(
        source, data, choice, arguments.out, arguments.num_workers, arguments.overwrite
    )
    if arguments.show:
        count = write_sheet(
            read_set(arguments.out, SetChoice("voc", all_lists=True)), arguments.show
        )
        print(f"{arguments.show}: {count} pictures with their labels")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 (it went wrong) or 2 (wrong arguments or input)."""
    options = parser().parse_args(arguments)
    options.out = options.out.resolve()

    def work() -> None:
        made = options.make(options)
        if not options.check:
            print(f"{options.out}: {'made' if made else 'is there with these options, kept'}")

    # A RuntimeError is a worker that was killed.
    return errors.run_command(
        work, failures=(RuntimeError,), when_interrupted="interrupted; run again to start anew"
    )


if __name__ == "__main__":
    sys.exit(errors.run_or_check_each(main))
