"""From two folders to an experiment: what they hold, what the machine is, which sizes fit the time.

`tools/run_pipeline.sh --images DIR --labels DIR` writes the YAML that comes of it into the run.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import yaml

from common import provenance
from common.annotations.files import walk
from common.annotations.formats import voc
from common.annotations.record import LabelledSet, PictureRecord, SetChoice, read_set
from common.errors import UserError, duration, require
from common.files import read_text, write_text
from common.pictures import PICTURE_SUFFIXES, BadPicture, decode, read_file
from pipeline.config import load_config
from pipeline.datasets.importers import SPLIT_NAMES, open_source
from pipeline.experiment import ROOT, ask
from pipeline.plan import build_stages
from pipeline.run import has_nvidia_gpu, side_by_side

YAML_FILE = "pipeline.yaml"
BUDGETS = {"quick": 600, "hour": 3600, "night": 10 * 3600}
"""Seconds of a whole run."""
_PLANNED_SHARE = 0.75  # of the budget: one measured step tells the time roughly
_PRETRAIN_SHARE = 0.45  # of the time for training
_SEEDS = {"quick": 1, "hour": 3, "night": 5}
_NUM_ARMS = 2  # random and pretrained

LEAST_POOL = 32  # two batches of the smallest size; below, negatives and BN say nothing
_LEAST_BATCH = 16
_LEAST_STEPS = 200  # of pretraining: the rate has hardly fallen before
_LEAST_ITERATIONS = 300  # of detection, see configs/detection/base_small.yaml
_MOST_PASSES = 400  # over the pool, and over the labelled pictures
_MOST_STEPS, _MOST_ITERATIONS = 3000, 1500  # where few pictures make many passes short
_BAD_SHARE = 20  # one picture in so many, and three at least, may be damaged
_PASSES_OF_A_PART, _LEAST_PART = 10, 1000  # where the pool is too large for the time
_LEAST_EVALUATED, _EVALUATION_SHARE = 100, 0.2  # pictures; of a detector's time
_OBJECT_PIXELS = 32  # of the median object in the detector: two cells of its stride 16

# Start, checks, calibration and page, measured on one core: seconds.
_FIXED_SECONDS = {"checks": 30.0, "pack": 8.0, "pretrain": 12.0, "convert": 12.0, "report": 15.0}
_PACK_SECONDS = 0.003  # of a picture, beside its decoding
_FIXED_SECONDS_OF_A_DETECTOR = 15.0
_PARALLEL_POWER = 0.8  # N threads are N^0.8 times as fast as one
_FORWARD_SHARE = 0.4  # of a training step that an evaluated picture takes


@dataclass(frozen=True)
class Machine:
    """Where the run goes: usable cores, memory and memory of the first GPU (0: none), in GB."""

    cores: int
    memory: float
    gpu_memory: float = 0.0

    def text(self) -> str:
        """For people."""
        gpu = f"a GPU of {self.gpu_memory:.0f} GB" if self.gpu_memory else "no GPU"
        return f"{self.cores} CPU cores, {self.memory:.0f} GB, {gpu}"


@dataclass(frozen=True)
class OwnData:
    """What the two folders hold.

    Attributes:
        pool: Folder that is packed for pretraining, and a sub-folder or list of it (or None).
        num_pool: Its pictures.
        labels: Folder of the labelled set.
        train_split, test_split: Its lists, named as `tools/train_voc.sh` names them.
        num_train, num_test: Pictures in them.
        classes: Names.
        max_left_out: Faulty labelled pictures and objects that are left out.
        short_side: Of labelled pictures, median, in pixels.
        aspect: Long over short side, median.
        objects: Square roots of boxes' areas over the short side of their picture: their deciles
            (9 numbers).
        decode_seconds: Of a labelled picture.
        notes: What a person should know.
    """

    pool: Path
    pool_split: str | None
    num_pool: int
    labels: Path
    train_split: str
    test_split: str
    num_train: int
    num_test: int
    classes: tuple[str, ...]
    max_left_out: int
    short_side: float
    aspect: float
    objects: tuple[float, ...]
    decode_seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Costs:
    """Seconds of one core, or of the GPU: for a picture in a pretraining epoch, in a step."""

    pretrain: float
    detection: float


@dataclass(frozen=True)
class Sizes:
    """What was chosen.

    Attributes:
        image_size, batch, epochs: Of pretraining.
        min_size, ims_per_batch, iterations: Of the detector; min_size in pixels.
        anchors: Sides in pixels.
        seeds, parallel: Detectors of an arm; how many stages run side by side.
        part, num_pool: Share of the pool that is packed, its pictures.
        num_eval: Test pictures that are evaluated.
        pretrain_seconds, detection_seconds, seconds: Expected, of all detectors, of the whole run.
    """

    image_size: int
    batch: int
    min_size: int
    ims_per_batch: int
    anchors: tuple[int, ...]
    seeds: int
    parallel: int
    epochs: int = 2
    iterations: int = 100
    part: float = 1.0
    num_pool: int = 0
    num_eval: int = 0
    pretrain_seconds: float = 0.0
    detection_seconds: float = 0.0
    seconds: float = 0.0


def this_machine() -> Machine:
    """Cores and memory that this process may use."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    gpu = 0.0
    if has_nvidia_gpu():  # torch may still be one that uses none
        code = "import torch as t; c = t.cuda; print(c.is_available() and c.mem_get_info()[1])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        gpu = float(done.stdout) / 1e9 if done.stdout.strip().isdecimal() else 0.0
    return Machine(provenance.usable_cores(), memory, gpu)


# -- the folders ----------------------------------------------------------------------------------


def survey(images: Path | None, labels: Path) -> OwnData:
    """Look at the two folders.

    Args:
        images: Pictures, labelled or not; None: the labelled ones.
        labels: A labelled set of any format that is read.
    Raises:
        UserError: If they are missing, swapped, empty or too small, or the labels are wrong.
    """
    for option, folder in (("--images", images), ("--labels", labels)):
        fault = "is a file: unpack an archive" if folder and folder.is_file() else "no such folder"
        require(folder is None or folder.is_dir(), f"{option} {folder}: {fault}; give a folder")
    num_pictures = sum(path.suffix.lower() in PICTURE_SUFFIXES for path in walk(labels))
    max_left_out = max(3, num_pictures // _BAD_SHARE)
    data = _labelled(images, labels, max_left_out)
    train, test = [p for split in data.train for p in split.pictures], data.test.pictures
    notes = [f"labels: {note}" for note in data.notes]

    # The pool.
    folder = labels if images is None else images
    pool, split, about = _pool_of(folder, data if folder == labels else None)
    num_pool = len(open_source(pool, split=split).pictures)
    if images is None:
        notes.append("no --images: pretraining on the labelled pictures, without their labels")
    notes += about
    remedy = (
        "leave --images out, and the labelled pictures are taken" if images and images != labels
        and num_pictures >= LEAST_POOL else "add pictures; they need no labels"
    )  # fmt: skip
    require(
        num_pool >= LEAST_POOL,
        f"{'--images' if images else '--labels'} {folder}: {num_pool} pictures; pretraining takes "
        f"{LEAST_POOL} at least, and hundreds to be of use: {remedy}",
    )
    inside = folder.resolve()
    if any(picture.file.resolve().is_relative_to(inside) for picture in test):
        notes.append(
            "the pictures of the evaluation lie in the pool too, without their labels: AP of the "
            "pretrained arm may be a little above that on pictures never seen"
        )
    if len(test) < 50:
        notes.append(f"AP of {len(test)} pictures is uncertain by several points; label more")

    sides = [sorted((picture.width, picture.height)) for picture in train]
    objects = [
        math.sqrt((box[2] - box[0]) * (box[3] - box[1])) / min(picture.width, picture.height)
        for picture in train
        for box in (item.box for item in picture.objects)
    ]
    return OwnData(
        pool=pool,
        pool_split=split,
        num_pool=num_pool,
        labels=labels,
        train_split="+".join(one.name for one in data.train),
        test_split=data.test.name,
        num_train=len(train),
        num_test=len(test),
        classes=data.classes,
        max_left_out=max_left_out,
        short_side=median(short for short, _ in sides),
        aspect=median(long / short for short, long in sides),
        objects=tuple(quantiles(objects * 2, n=10)),  # of two values at least
        decode_seconds=_decode_seconds(train),
        notes=tuple(notes),
    )


def _labelled(images: Path | None, labels: Path, max_left_out: int) -> LabelledSet:
    """The labelled set; what is wrong with it, and what to try instead."""
    choice = SetChoice(max_left_out=max_left_out)
    try:
        return read_set(labels, choice)
    except UserError as error:
        if images is None or images.resolve() == labels.resolve():
            raise UserError(f"--labels {error}") from None
        fault = str(error)
    # Perhaps they are swapped, or the annotations lie apart from their pictures.
    above = Path(os.path.commonpath([images.resolve(), labels.resolve()]))
    tries = [(images, f"swapped? Give --images {labels} --labels {images}")]
    if above not in (images.resolve(), labels.resolve()) and len(above.parts) > 2:
        tries.append((above, f"do its pictures lie in {images}? Give --labels {above}"))
    for folder, remedy in tries:
        try:
            read_set(folder, choice)
        except UserError:
            continue
        raise UserError(f"--labels {fault}\n  {folder} holds labelled pictures: {remedy}")
    raise UserError(f"--labels {fault}")


def _pool_of(folder: Path, data: LabelledSet | None) -> tuple[Path, str | None, list[str]]:
    """The pictures of a folder: itself and a sub-folder or list to choose, and remarks."""
    if years := voc.year_folders(folder):
        if len(years) == 1 and (years[0] / "JPEGImages").is_dir():
            return years[0] / "JPEGImages", None, []
        names = [set(voc.list_names(year)) for year in years]
        usual = [x for x in ("trainval", "train", *sorted(set.union(*names))) if any(
            x in one for one in names)]  # fmt: skip
        require(bool(usual), f"{folder}: a VOC devkit without lists; give its JPEGImages")
        return folder, usual[0], [f"pool: list {usual[0]} of the devkit"]
    tops = {path.relative_to(folder).parts[0]: path for path in walk(folder)
            if path.suffix.lower() in PICTURE_SUFFIXES}  # fmt: skip
    folders = sorted(name for name, path in tops.items() if path.parent != folder)
    if len(folders) > 1 and len(folders) == len(tops) and {x.lower() for x in tops} <= SPLIT_NAMES:
        train = next((x for x in folders if x.lower() in ("train", "training")), folders[0])
        return folder, train, [f"pool: the folder {train} of {', '.join(folders)}"]
    return folder, None, []


def _decode_seconds(pictures: list[PictureRecord]) -> float:
    """Processor time of decoding a picture; the median of some."""
    took = []
    for picture in pictures[:: max(1, len(pictures) // 5)][:5]:
        began = time.process_time()
        with contextlib.suppress(BadPicture):  # the checks name all of these
            decode(read_file(picture.file), where=str(picture.file))
        took.append(time.process_time() - began)
    return median(took)


# -- sizes ----------------------------------------------------------------------------------------


def _power_of_2(at_most: float, low: int, high: int) -> int:
    """The largest power of 2 up to a number, within bounds."""
    return min(max(2 ** int(math.log2(max(at_most, 1))), low), high)


def first_sizes(data: OwnData, machine: Machine, budget: str) -> Sizes:
    """Sizes by machine, pictures and objects, before times are known.

    On a CPU the thin detector at 128 to 512 px, so that the median object has 32 px if it can be;
    on a GPU those of the VOC protocol, at most twice the pictures' own.
    """
    usable = data.num_pool - max(3, data.num_pool // _BAD_SHARE)
    if machine.gpu_memory:
        # About 0.16 GB for two views of 224 px in bf16, 2.6 GB for a picture of 800 px in R50-C4.
        batch = _power_of_2(min(machine.gpu_memory / 0.16, usable / 3), _LEAST_BATCH, 256)
        min_size = min(800, 32 * round(2 * data.short_side / 32))
        ims = _power_of_2(machine.gpu_memory / 2.6, 2, 16)
        anchors = tuple(max(8, round(side * min_size / 800)) for side in (32, 64, 128, 256, 512))
        return Sizes(224, batch, max(128, min_size), ims, anchors, _SEEDS[budget], 1)
    most = {"quick": 256, "hour": 384, "night": 512}[budget]
    wanted = min(_OBJECT_PIXELS / data.objects[4], max(128.0, data.short_side), most)
    parallel = side_by_side("auto", _NUM_ARMS) if machine.cores > 1 else 1
    parallel = min(parallel, max(1, int(machine.memory / 3)), machine.cores)
    return _with_anchors(
        data,
        Sizes(
            image_size={"quick": 64, "hour": 96, "night": 128}[budget],
            batch=_power_of_2(usable / 3, _LEAST_BATCH, 128),
            min_size=max(128, 32 * round(wanted / 32)),
            ims_per_batch=4,
            anchors=(),
            seeds=_SEEDS[budget],
            parallel=parallel,
        ),
    )


def _with_anchors(data: OwnData, sizes: Sizes) -> Sizes:
    """Anchors for the small, the middling and the large objects of the set, in the detector."""
    sides = [data.objects[i] * sizes.min_size for i in (0, 4, 8)]
    return replace(sizes, anchors=tuple(max(8, 8 * round(side / 8)) for side in sides))


def fit(data: OwnData, machine: Machine, budget: str, sizes: Sizes, costs: Costs) -> Sizes:
    """Choose epochs and iterations, so that the whole run takes its share of the budget.

    They are at least what can train at all, and at most a few hundred passes over the pictures;
    `seconds` of the result may exceed the budget.
    """
    cores, num_detectors = machine.cores, _NUM_ARMS * sizes.seeds

    # N threads beside each other, or the GPU and as many processes that decode.
    def speed(cores: float) -> float:
        return 1.0 if machine.gpu_memory else max(1.0, cores) ** _PARALLEL_POWER

    decoding = data.decode_seconds / (min(4, cores) if machine.gpu_memory else 1)
    fixed = sum(_FIXED_SECONDS.values())
    fixed += (data.num_train + data.num_test) * data.decode_seconds / cores  # the checks open all
    fixed += _FIXED_SECONDS_OF_A_DETECTOR * num_detectors / sizes.parallel
    time_left = max(0.0, BUDGETS[budget] * _PLANNED_SHARE - fixed)

    # Pretraining: of a large pool a random part, so that several passes fit.
    packing = (_PACK_SECONDS + data.decode_seconds) / cores
    sample = costs.pretrain / speed(cores)
    fitting = int(_PRETRAIN_SHARE * time_left / (packing + _PASSES_OF_A_PART * sample))
    num_pool = min(data.num_pool, max(fitting, _LEAST_PART))
    part = 1.0 if num_pool == data.num_pool else math.ceil(1000 * num_pool / data.num_pool) / 1000
    num_pool = round(part * data.num_pool)
    steps = max(1, num_pool // sizes.batch)
    most = max(_MOST_PASSES, math.ceil(_MOST_STEPS / steps))
    least = max(2, math.ceil(_LEAST_STEPS / steps))
    pretrain_time = _PRETRAIN_SHARE * time_left - num_pool * packing
    epochs = min(max(int(pretrain_time / (num_pool * sample)), least), most)
    pretraining = num_pool * (packing + epochs * sample)

    # Detection: of many test pictures some, then as many iterations as fit.
    area = min(data.aspect, 2.0)  # times are of square pictures
    step = costs.detection * area / speed(cores / sizes.parallel)
    evaluated = step * _FORWARD_SHARE + decoding
    times = num_detectors / sizes.parallel
    each = max(0.0, time_left - pretraining) / times
    num_eval = min(data.num_test, max(_LEAST_EVALUATED, int(_EVALUATION_SHARE * each / evaluated)))
    iterations = int((each - num_eval * evaluated) / (sizes.ims_per_batch * (step + decoding)))
    most = max(_MOST_ITERATIONS, _MOST_PASSES * data.num_train // sizes.ims_per_batch)
    iterations = 10 * (min(max(iterations, _LEAST_ITERATIONS), most) // 10)
    detection = iterations * sizes.ims_per_batch * (step + decoding) + num_eval * evaluated
    return replace(
        sizes,
        part=part,
        num_pool=num_pool,
        epochs=epochs,
        iterations=iterations,
        num_eval=num_eval,
        pretrain_seconds=pretraining,
        detection_seconds=times * detection,
        seconds=fixed + pretraining + times * detection,
    )


def choose(data: OwnData, machine: Machine, budget: str, name: str, out: Path) -> Sizes:
    """Sizes whose steps were measured here; smaller ones where too few iterations would fit.

    Raises:
        UserError: If a program refuses its settings.
    """
    sizes = first_sizes(data, machine, budget)
    while True:
        fitted = fit(data, machine, budget, sizes, _measure(data, machine, sizes, name, out))
        is_smallest = (sizes.ims_per_batch if machine.gpu_memory else sizes.min_size / 64) <= 2
        if fitted.iterations > _LEAST_ITERATIONS or is_smallest:
            return fitted
        if machine.gpu_memory:
            sizes = replace(sizes, ims_per_batch=sizes.ims_per_batch // 2)
        else:
            smaller = max(128, 32 * int(sizes.min_size * 0.75 / 32))
            sizes = _with_anchors(data, replace(sizes, min_size=smaller))


def _measure(data: OwnData, machine: Machine, sizes: Sizes, name: str, out: Path) -> Costs:
    """What the programs' own checks measure, in seconds of one core."""
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, YAML_FILE)
        draft.write_text(to_yaml(data, machine, sizes, name), encoding="utf-8")
        stages = build_stages(load_config(draft), ROOT, out)
    chosen = {}
    for stage in stages:
        if stage.name in ("pretrain", "random/seed-0"):
            # Settings alone: the pictures are checked when the run begins.
            words = ["settings" if word == "all" else word for word in stage.check]
            chosen[stage.name] = {stage.name: replace(stage, check=tuple(words))}
    with ThreadPoolExecutor(2) as threads:
        answers = threads.map(lambda one: ask(one, ROOT, OMP_NUM_THREADS="1"), chosen.values())
        told = dict(zip(chosen, (answer[0] for answer in answers), strict=True))
    for stage, answer in told.items():
        require("error" not in answer, f"stage {stage}: {answer.get('error')}")
    steps = sizes.iterations * sizes.ims_per_batch
    return Costs(told["pretrain"]["seconds_per_sample"], told["random/seed-0"]["seconds"] / steps)


# -- the YAML -------------------------------------------------------------------------------------


def to_yaml(data: OwnData, machine: Machine, sizes: Sizes, name: str, budget: str = "") -> str:
    """The experiment as a person would write it, with the reason of each size."""
    is_thin = not machine.gpu_memory
    num_pool = sizes.num_pool or data.num_pool
    queue = min(4096, num_pool // sizes.batch * sizes.batch)
    steps = sizes.epochs * (num_pool // sizes.batch)
    is_part, is_some = sizes.part < 1, 0 < sizes.num_eval < data.num_test
    part = f'    part: "0:{sizes.part:g}"  # {num_pool} pictures at random: all take too long\n'
    some = f"    num_eval_images: {sizes.num_eval}  # the first; all take too long\n"
    workers = 1 if machine.cores <= 2 else min(8, machine.cores // 2)
    scale = list(range(480, 801, 32)) if sizes.min_size == 800 else [
        32 * round(share * sizes.min_size / 32) for share in (0.6, 0.8, 1.0)]  # fmt: skip

    def q(value: Any) -> str:
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
        return text.removesuffix("\n...\n").strip()

    arch = "" if is_thin else (
        "    arch: {width_per_group: 64, stem_channels: 64, res2_channels: 256}\n"
        "    heads: {projector_hidden_dim: 2048, predictor_hidden_dim: 2048, output_dim: 256}\n"
    )  # fmt: skip
    detector = (
        "  config: configs/detection/thin_R50_C4.yaml  # few channels: there is no GPU\n"
        if is_thin
        else "  config: configs/detection/voc0712_R50_C4_24k.yaml  # the protocol of VOC\n"
    )
    inputs = {
        "MIN_SIZE_TRAIN": str(tuple([sizes.min_size] if is_thin else scale)),
        "MIN_SIZE_TEST": sizes.min_size,
        "MAX_SIZE_TRAIN": 2 * sizes.min_size if is_thin else round(1333 * sizes.min_size / 800),
        "MAX_SIZE_TEST": 2 * sizes.min_size if is_thin else round(1333 * sizes.min_size / 800),
    }
    solver: dict[str, Any] = {"MAX_ITER": sizes.iterations}
    extra = ""
    if not is_thin:
        rate = round(0.02 * sizes.ims_per_batch / 16, 5)
        solver |= {"IMS_PER_BATCH": sizes.ims_per_batch, "BASE_LR": rate, "REFERENCE_WORLD_SIZE": 0}
        num_precise = min(200, max(10, sizes.iterations // 10))
        extra = f"    TEST: {{PRECISE_BN: {{NUM_ITER: {num_precise}}}}}\n"
    else:
        extra = f"    TEST: {{EVAL_PERIOD: {sizes.iterations}}}  # once, at the end\n"
    return f"""\
# Made by tools/run_pipeline.sh from two folders, for {machine.text()}{budget and f", budget {budget}"}.
# Expected: about {duration(sizes.seconds)}; pretraining {duration(sizes.pretrain_seconds)}, \
{_NUM_ARMS * sizes.seeds} detectors {duration(sizes.detection_seconds)}.
# Change what you like (docs/pipeline.md) and go on, which repeats only what the change touches:
#   bash tools/run_pipeline.sh THIS_FILE --out ITS_FOLDER
name: {q(name)}
data:
  kind: existing
  dataset: {q(str(data.labels))}  # {data.num_train} pictures to train on, {data.num_test} to evaluate
  pool: {q(str(data.pool))}  # {data.num_pool} pictures
  pool_split: {q(data.pool_split)}
shards:
  options:
    resize_short: {max(160, sizes.image_size * 8 // 7)}  # views are {sizes.image_size} px
    max_bad: {max(3, data.num_pool // _BAD_SHARE)}  # damaged pictures, at most; they are listed
{part * is_part}\
pretrain:
  config: configs/pretrain/demo.yaml
  overrides:
{arch}    # Batch: at least three in an epoch, {"128" if is_thin else "by the GPU's memory, 256"} at most.
    data: {{image_size: {sizes.image_size}, batch_size: {sizes.batch}, num_workers: {workers}}}
    fa: {{queue_size: {queue}, min_fill: {min(1024, queue // 2)}}}  # not more than the pool
    optim: {{epochs: {sizes.epochs}, warmup_epochs: {max(1, sizes.epochs // 20)}}}  # {steps} steps
    eval: {{knn_every_epochs: {max(1, sizes.epochs // 4)}}}
detection:
{detector}  options:
    train_split: {q(data.train_split)}
    test_split: {q(data.test_split)}
    max_left_out: {data.max_left_out}  # faulty pictures and objects, at most; they are counted
{some * is_some}\
  overrides:
    # {sizes.min_size} px of the pictures' {data.short_side:.0f}: the median object has \
{data.objects[4] * sizes.min_size:.0f} px.
    INPUT: {q(inputs)}
    MODEL: {{ANCHOR_GENERATOR: {{SIZES: "{[list(sizes.anchors)]}"}}}}  # {"small, middling, large objects" if is_thin else "as VOC's, to scale"}
    SOLVER: {q(solver)}  # {sizes.iterations * sizes.ims_per_batch / data.num_train:.0f} passes
{extra}  seeds: {sizes.seeds}  # {"one gives no interval: detection.seeds=3" if sizes.seeds == 1 else "for intervals"}
  arms: [random, pretrained]
  parallel: {sizes.parallel}
"""  # noqa: E501


def prepare(images: Path | None, labels: Path, out: Path, budget: str, *, is_dry: bool) -> str:
    """The YAML of a run of two folders; the one that it holds already, or else what is chosen.

    Args:
        images: See `survey`.
        labels: See `survey`.
        out: Folder of the run.
        budget: A key of `BUDGETS`.
        is_dry: Whether nothing is written.
    Raises:
        UserError: See `survey`; if `out` is of other folders or another budget.
    """
    images, labels = images and images.absolute(), labels.absolute()
    for option, folder in (("--images", images), ("--labels", labels)):
        is_inside = folder is not None and out.resolve().is_relative_to(folder.resolve())
        require(not is_inside, f"--out {out}: lies in {option} {folder}; give a folder elsewhere")
    header = "# " + yaml.safe_dump(
        {"images": images and str(images), "labels": str(labels), "budget": budget},
        default_flow_style=True, width=10**6, allow_unicode=True,
    )  # fmt: skip
    file = out / YAML_FILE
    if file.is_file():
        text = read_text(file)
        require(
            text.startswith(header),
            f"{file}: was made from other folders or another budget; go on with `bash "
            f"tools/run_pipeline.sh {file} --out {out}`, or choose another --out",
        )
        print(f"settings: {file}, as it stands")
        return text

    data, machine = survey(images, labels), this_machine()
    more = f" ({', '.join(data.classes[:5])}{', ..' * (len(data.classes) > 5)})"
    print(f"pictures: {data.pool}: {data.num_pool} to pretrain on")
    print(f"labels:   {labels}: {data.num_train} to train on, {data.num_test} to evaluate, "
          f"{len(data.classes)} classes{more}")  # fmt: skip
    for note in data.notes:
        print(f"note:     {note}")
    print(f"machine:  {machine.text()}; measuring steps ..", flush=True)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", out.name).strip("-.") or "own"
    sizes = choose(data, machine, budget, name, out)
    kind = "ResNet-50" if machine.gpu_memory else "thin ResNet-50"
    print(f"plan:     {kind}, {sizes.num_pool} pictures at {sizes.image_size} px, {sizes.epochs} "
          f"epochs of batch {sizes.batch}: about {duration(sizes.pretrain_seconds)}\n"
          f"          {_NUM_ARMS * sizes.seeds} detectors, {sizes.min_size} px, {sizes.iterations} "
          f"iterations of {sizes.ims_per_batch}: about {duration(sizes.detection_seconds)}\n"
          f"          whole run: about {duration(sizes.seconds)} of {duration(BUDGETS[budget])} "
          f"(--budget {budget})")  # fmt: skip
    if sizes.seconds > BUDGETS[budget]:
        print(f"note:     that is more than --budget {budget}: less would not train at all")
    text = header + to_yaml(data, machine, sizes, name, budget)
    if not is_dry:
        out.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
        print(f"settings: {file}, with the reason of each size")
    return text
