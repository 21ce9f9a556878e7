"""Which pictures are trained on and which evaluated: a set's own lists, or a seeded split."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from common.annotations import record
from common.annotations.checks import ANNOTATION, NOT_CHOSEN, PICTURE, Findings, composed
from common.config import unknown
from common.errors import UserError
from common.files import sha256_of
from common.pictures import fault_of
from common.provenance import usable_cores

TRAIN, VAL, TEST, ALL = "train", "val", "test", "all"
_ROLES = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation"), VAL),
    **dict.fromkeys(("test", "testing"), TEST),
}
_MAX_RELATED = 100  # pictures with which one that is moved changes places
_END = re.compile(r"[\d_.-]*$")  # of train2017
_COPY = re.compile(r"\.rf\.[^/]*$")  # of Roboflow's augmented copies: photo_jpg.rf.1f0a29.jpg
COPIES = "copies of a picture (NAME.rf.HASH, or the same bytes): all on one side of the split"
SHARED = "pictures in both lists: AP counts pictures trained on"
COPIED = "pictures to evaluate with the bytes of one that is trained on: AP counts them"
OUTSIDE = "pictures in no list's folder: left out"
_Picture = TypeVar("_Picture", bound=Hashable)


def role_of(*names: str) -> str | None:
    """What the first name that tells it is for: "train", "val" or "test"; None if none does."""
    return next((_ROLES[x.lower()] for x in names if x.lower() in _ROLES), None)


def by_role(
    names: Mapping[_Picture, Sequence[str]], findings: Findings
) -> dict[str, list[_Picture]]:
    """Group pictures by the first folder of theirs that is called train, valid or the like.

    Args:
        names: Picture -> names of the folders that say it.
        findings: Pictures in no such folder are counted here if they are left out.

    Returns:
        Role -> pictures. Where some lie in no such folder, these are left out if there are lists
        for training and for evaluation; else all pictures are under "all".
    """
    found: dict[str, list[_Picture]] = {}
    for picture, folders in names.items():
        found.setdefault(role_of(*folders) or ALL, []).append(picture)
    outside = found.pop(ALL, [])
    if outside and not (TRAIN in found and (VAL in found or TEST in found)):
        return {ALL: list(names)}
    findings.ignored[OUTSIDE] += len(outside)
    return found


def list_reader(
    root: Path,
    lists: Mapping[str, Sequence[_Picture]],
    read: Callable[[_Picture], record.PictureRecord],
    findings: Findings,
) -> Callable[[str], record.LabelledSplit]:
    """What reads one of some lists of pictures; those that `read` refuses are left out."""

    def load(name: str) -> record.LabelledSplit:
        if name not in lists:
            raise UserError(f"{root}: has no list {name!r}; it has {', '.join(lists)}")
        pictures = findings.usable(ANNOTATION, lists[name], read)
        return record.LabelledSplit(root, name, pictures)

    return load


def assemble(
    root: Path,
    lists: Collection[str],
    load: Callable[[str], record.LabelledSplit],
    choice: record.SetChoice,
    findings: Findings,
    *,
    stated: Callable[[], Sequence[str] | None] = lambda: None,
    usual: tuple[str, str] | None = None,
    names_unused: bool = False,
    says_roles: bool = False,
    metric_year: int | None = 2012,
    name: str | None = None,
) -> record.LabelledSet:
    """Choose lists and classes of a set, and read what is needed.

    Without lists of its own for training and for evaluation, all pictures are split into "train"
    and "val"; if only a test list is needed, it is "all".

    Args:
        root: Of the set.
        lists: Names of its lists.
        load: Reads one of them; raises for others.
        choice: What is wanted.
        findings: Of the reader.
        stated: After reading, the classes that the set itself names; None: those that occur.
        usual: Lists for training, joined by +, and for evaluation that are not guessed.
        names_unused: Whether the user is told of the other lists beside `usual`, too.
        says_roles: Whether a file of the set says what its lists are for.
        metric_year: Of the set, unless the choice says it.
        name: Of the set; None: its folder's.

    Raises:
        UserError: If there is no such list or class, or nothing to train on; or if pictures are in
            both lists, and neither the choice nor the set names these.
    """

    def loaded(one: str) -> record.LabelledSplit:
        split = load(one)
        if not (choice.decodes or choice.max_left_out):
            return split
        # Pictures that do not decode are left out.
        with ThreadPoolExecutor(usable_cores()) as pool:
            faults = list(pool.map(fault_of, [picture.file for picture in split.pictures]))
        for fault in filter(None, faults):
            findings.leave_out(UserError(f"{fault}; replace the picture"), PICTURE)
        kept = (x for x, fault in zip(split.pictures, faults, strict=True) if fault is None)
        return replace(split, pictures=tuple(kept))

    read: dict[str, record.LabelledSplit] = {}
    roles = usual or _roles(root, lists, choice)
    is_split = roles is None
    if roles is None:
        whole = [loaded(one) for one in lists]
        findings.raise_faults()
        read = _split(root, whole, choice, findings)
        lists, roles = (TRAIN, VAL), (TRAIN, ALL if choice.test_only else VAL)
    train_names = [] if choice.test_only else (choice.train_split or roles[0]).split("+")
    test_name = choice.test_split or roles[1]
    if "+" in test_name:
        raise UserError(f"--test-split {test_name}: give one list; AP is taken over one set")
    needed = dict.fromkeys([*train_names, test_name])
    others = [one for one in lists if one not in needed] if choice.all_lists else []
    for one in [*needed, *others]:
        if is_split and one not in read:
            raise UserError(
                f"{root}: {unknown(f'list {one!r}', one, [*read])}; it has no lists of its own"
            )
        if one not in read:
            read[one] = loaded(one)
            findings.raise_faults()
    splits = {one: read[one] for one in [*needed, *others]}
    is_named = says_roles or bool(choice.train_split and choice.test_split)
    _count_shared(root, splits, train_names, test_name, is_split, is_named, findings)
    unused = [one for one in lists if one not in needed]
    is_told = choice.test_only or choice.all_lists or choice.train_split
    if unused and not is_told and (usual is None or names_unused):
        remedy = "--train-split takes them, joined by +"
        findings.ignored[f"lists that are not used ({', '.join(unused)}): {remedy}"] += len(unused)
    classes = _choose_classes(root, splits, stated(), choice, findings)
    for one in needed:
        if not splits[one].num_objects:
            none = f"none of its {len(splits[one].pictures)} pictures holds an object"
            raise UserError(f"{root}: list {one!r}: {none}; choose another")
    return record.LabelledSet(
        root=root,
        name=name or root.resolve().name,
        classes=classes,
        metric_year=choice.metric_year or metric_year,
        train=tuple(splits[one] for one in train_names),
        test=splits[test_name],
        others=tuple(splits[one] for one in others),
        repaired=dict(+findings.repairs),
        left_out=findings.all_left_out(),
        faults=tuple(line.replace(f"{root}{os.sep}", "") for line in findings.lines()),
    )


def _count_shared(
    root: Path, splits: Mapping[str, record.LabelledSplit], train_names: Sequence[str],
    test_name: str, is_split: bool, is_named: bool, findings: Findings,
) -> None:  # fmt: skip
    """Count pictures that are trained on and evaluated: the same files, and copies of them.

    Raises:
        UserError: If there are such files, and nobody has named these lists.
    """
    trained = dict.fromkeys(x.file for one in train_names for x in splits[one].pictures)
    shared = [x.file for x in splits[test_name].pictures if x.file in trained]
    if shared and not is_named:
        raise UserError(
            f"{root}: {len(shared)} pictures are in both lists, {'+'.join(train_names)} and "
            f"{test_name}, as {shared[0]}; take them out of one, or choose both with --train-split "
            "and --test-split"
        )
    findings.repairs[SHARED] += len(shared)
    tested = [x.file for x in splits[test_name].pictures if x.file not in trained]
    if copied := {} if is_split else _copied(trained, tested):
        first = (os.path.relpath(file, root) for file in next(iter(copied.items())))
        findings.repairs[f"{COPIED}, as {' of '.join(first)}"] += len(copied)


def _choose_classes(
    root: Path, splits: dict[str, record.LabelledSplit], told: Sequence[str] | None,
    choice: record.SetChoice, findings: Findings,
) -> tuple[str, ...]:  # fmt: skip
    """The chosen classes, else those of the set in its order, else those that occur.

    Objects of other classes than the chosen ones are taken out of `splits`.

    Raises:
        UserError: If a chosen class is none of the set's.
    """
    present = sorted({x.class_name for split in splits.values() for y in split.pictures
                      for x in y.objects})  # fmt: skip
    classes = tuple(told if told is not None else present)
    if choice.classes is not None:
        if choice.test_only:
            own = classes if told is not None else {*present, *choice.classes}
            record.check_same_classes(root, sorted(own), choice.classes)
        for one in choice.classes:
            if one not in classes and told is not None:
                raise UserError(f"--classes: {unknown(f'class {one!r}', one, classes)}")
            if one not in present and not choice.test_only:
                findings.repairs[f"class of --classes that does not occur, {one}"] += 1
        classes = choice.classes
        for one, split in splits.items():
            splits[one] = split.where(lambda item: item.class_name in classes)
            findings.ignored[NOT_CHOSEN] += split.num_objects - splits[one].num_objects
    alike: dict[str, list[str]] = {}
    for one in classes:
        alike.setdefault(one.casefold(), []).append(one)
    for same in (x for x in alike.values() if len(x) > 1):
        findings.repairs[f"classes that differ by capitals alone ({', '.join(same)}): kept apart; "
                         "rename one if they are the same"] += len(same)  # fmt: skip
    return classes


def _copied(trained: Collection[Path], tested: Collection[Path]) -> dict[Path, Path]:
    """Files to evaluate -> one with the same bytes that is trained on.

    Only files are read whose size is that of one on the other side.
    """
    sizes = {file: file.stat().st_size for file in (*trained, *tested)}
    common = {sizes[file] for file in trained} & {sizes[file] for file in tested}
    known = {sha256_of(file): file for file in trained if sizes[file] in common}
    found = ((file, known.get(sha256_of(file))) for file in tested if sizes[file] in common)
    return {file: other for file, other in found if other is not None}


def _roles(root: Path, lists: Collection[str], choice: record.SetChoice) -> tuple[str, str] | None:
    """The list to train on and the one to evaluate on; None if there are none for both."""
    of_role: dict[str, str] = {}
    for one in lists:
        of_role.setdefault(role_of(one, _END.sub("", one)) or one, one)
    train = of_role.get(TRAIN) or of_role.get("trainval")
    test = of_role.get(TEST) or of_role.get(VAL)
    train_names = (choice.train_split or "").split("+")
    is_told = choice.test_split in lists and (choice.test_only or set(train_names) <= {*lists})
    if is_told or (test and (train or choice.test_only)):
        return choice.train_split or train or "", choice.test_split or test or ""
    if len(lists) > 1 and not choice.test_only:
        raise UserError(
            f"{root}: its lists are {', '.join(lists)}; say which with --train-split and "
            "--test-split"
        )
    return None


# -- the split -------------------------------------------------------------------------------------


def _split(
    root: Path, whole: Sequence[record.LabelledSplit], choice: record.SetChoice, findings: Findings
) -> dict[str, record.LabelledSplit]:
    """All pictures, and the two parts of them; a picture's name is its path below the root."""
    pictures = {
        composed(Path(os.path.relpath(picture.file, root)).as_posix()): picture
        for split in whole
        for picture in split.pictures
    }
    if not pictures:
        raise UserError(f"{root}: holds no labelled picture that can be read; see --format")
    if len(whole) > 1:  # whose numbers may be the same
        pictures = {key: replace(item, image_id=key) for key, item in pictures.items()}

    def part(name: str, chosen: Collection[str]) -> record.LabelledSplit:
        rows = tuple(pictures[key] for key in sorted(pictures) if key in chosen)
        return record.LabelledSplit(root, name, rows)

    everything = {ALL: part(ALL, pictures)}
    if choice.test_only and choice.test_split in (None, ALL):
        return everything
    kept = None if choice.test_only else choice.classes
    groups = {keys[0]: keys for keys in _copies(pictures)}
    findings.repairs[COPIES] += sum(len(keys) for keys in groups.values() if len(keys) > 1)
    classes_of = {
        first: {
            item.class_name
            for key in keys
            for item in pictures[key].objects
            if kept is None or item.class_name in kept
        }
        for first, keys in groups.items()
    }
    chosen = seeded_split(classes_of, choice.val_share, choice.split_seed)
    val = {key for first in chosen for key in groups[first]}
    return everything | {TRAIN: part(TRAIN, pictures.keys() - val), VAL: part(VAL, val)}


def _copies(pictures: Mapping[str, record.PictureRecord]) -> list[list[str]]:
    """Names in groups: Roboflow's copies of one picture, and files of the same bytes; sorted."""
    sizes = {name: picture.file.stat().st_size for name, picture in pictures.items()}
    count, above = Counter(sizes.values()), dict[str, str]()

    def first_of(mark: str) -> str:  # of those that belong together
        while (other := above.setdefault(mark, mark)) != mark:
            above[mark], mark = above[other], other
        return mark

    for name, picture in pictures.items():
        if count[sizes[name]] > 1:
            above[first_of(_COPY.sub("", name))] = first_of(sha256_of(picture.file))
    groups: dict[str, list[str]] = {}
    for name in sorted(pictures):
        groups.setdefault(first_of(_COPY.sub("", name)), []).append(name)
    return list(groups.values())


def seeded_split(classes_of: Mapping[str, Collection[str]], share: float, seed: int) -> set[str]:
    """Choose pictures for the evaluation: of every class the same share, rare classes first.

    Iterative stratification (Sechidis, Tsoumakas, Vlahavas, 2011) with two parts. A function of
    the arguments; their order does not matter. A class in two pictures or more is on both sides
    where that is possible by moving one or two pictures at a time.

    Args:
        classes_of: Name of a picture -> classes on it, maybe none.
        share: Of the pictures, between 0 and 1.
        seed: Other choice.

    Raises:
        UserError: If the share is none, or there is one picture alone.
    """
    if not 0 < share < 1:
        raise UserError(f"--val-share {share:g}: give a number between 0 and 1")
    if len(classes_of) < 2:
        raise UserError(
            "one labelled picture, or copies of one, cannot be split for training and evaluation; "
            "add more"
        )

    def hashed(name: str) -> bytes:
        data = f"{seed}/{name}".encode(errors="surrogatepass")
        return hashlib.blake2b(data, digest_size=16).digest()

    order = sorted(classes_of, key=lambda name: (hashed(name), name))
    own = {name: frozenset(classes_of[name]) or frozenset(("",)) for name in order}  # "": no object
    pictures_of: dict[str, list[str]] = {}
    for name in order:
        for label in own[name]:
            pictures_of.setdefault(label, []).append(name)
    chosen: dict[str, bool] = {}
    for _, names in sorted(pictures_of.items(), key=lambda item: (len(item[1]), item[0])):
        wanted = min(round(share * len(names)), len(names) - 1)
        wanted -= sum(chosen.get(name, False) for name in names)
        for name in names:
            if name not in chosen:
                chosen[name] = wanted > 0
                wanted -= 1
    if not any(chosen.values()):  # every class is in one picture alone
        chosen[order[0]] = True
    _mend(order, own, chosen)
    return {name for name in order if chosen[name]}


def _mend(order: Sequence[str], own: Mapping[str, frozenset[str]], chosen: dict[str, bool]) -> None:
    """Move pictures, one or two at a time, so that more classes are on both sides."""
    total = Counter(label for name in order for label in own[name] if label)
    sides = Counter((label, chosen[name]) for name in order for label in own[name])

    def is_lonely(label: str) -> bool:
        return total[label] > 1 and 0 in (sides[label, True], sides[label, False])

    def move(*names: str) -> None:
        for name in names:
            for label in own[name]:
                sides[label, chosen[name]] -= 1
                sides[label, not chosen[name]] += 1
            chosen[name] = not chosen[name]

    def is_better_moved(*names: str) -> bool:
        labels = frozenset().union(*(own[name] for name in names))
        before = sum(map(is_lonely, labels))
        move(*names)
        if sum(map(is_lonely, labels)) < before and len(set(chosen.values())) == 2:
            return True
        move(*names)
        return False

    for name in [*order] * 3:  # a later move makes an earlier one possible
        if any(map(is_lonely, own[name])) and not is_better_moved(name):
            related = [one for one in order if one != name and own[one] & own[name]]
            any(is_better_moved(name, one) for one in related[:_MAX_RELATED])
