"""An experiment for two folders: sizes by machine, pictures and time, measured and written as YAML.

`tools/run_pipeline.sh --images DIR --labels DIR` leaves the YAML in the run.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import provenance
from common.config import in_one_line, read_settings, with_overrides
from common.errors import UserError, duration, printable, require
from common.files import read_text, write_text
from pipeline.config import PipelineConfig, load_config
from pipeline.experiment import ROOT, as_settings, ask
from pipeline.own_data import OwnData, num_bad, survey
from pipeline.run import has_nvidia_gpu, side_by_side
from pipeline.stages import build_stages, joined_options

YAML_FILE = "pipeline.yaml"
BUDGETS = {"quick": 600, "hour": 3600, "night": 10 * 3600}
"""Seconds of a whole run."""
_GIVEN = "# given: "
_BEFORE = "# Before what was given, with the reason of each size:\n"
_PLANNED_SHARE = 0.75  # of the budget: one measured step tells the time roughly
_PRETRAIN_SHARE = 0.45  # of the time for training
_SEEDS = {"quick": 1, "hour": 3, "night": 5}
_NUM_ARMS = 2  # random and pretrained

_LEAST_BATCH = 16
_LEAST_STEPS = 200  # of pretraining: the rate has hardly fallen before
_LEAST_ITERATIONS = 300  # of detection, see configs/detection/base_small.yaml
_MOST_PASSES = 400  # over the pool, and over the labelled pictures
_MOST_STEPS, _MOST_ITERATIONS = 3000, 1500  # where few pictures make many passes short
_PASSES_OF_A_PART, _LEAST_PART = 10, 1000  # where the pool is too large for the time
_LEAST_EVALUATED, _EVALUATION_SHARE = 100, 0.2  # pictures; of a detector's time
_OBJECT_PIXELS = 32  # of the median object in the detector: two cells of its stride 16

# Start, checks, calibration and page: seconds, roughly.
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


# -- sizes ----------------------------------------------------------------------------------------


def _power_of_2(at_most: float, low: int, high: int) -> int:
    """The largest power of 2 up to a number, within bounds."""
    return min(max(2 ** int(math.log2(max(at_most, 1))), low), high)


def first_sizes(data: OwnData, machine: Machine, budget: str) -> Sizes:
    """Sizes by machine, pictures and objects, before times are known.

    On a CPU the thin detector at 128 to 512 px, so that the median object has 32 px if it can be;
    on a GPU those of the VOC protocol, at most twice the pictures' own.
    """
    usable = data.num_pool - num_bad(data.num_pool)
    if machine.gpu_memory:
        # About 0.16 GB for two views of 224 px in bf16, 2.6 GB for a picture of 800 px in R50-C4.
        batch = _power_of_2(min(machine.gpu_memory / 0.16, usable / 3), _LEAST_BATCH, 256)
        min_size = min(800, 32 * round(2 * data.short_side / 32))
        ims = _power_of_2(machine.gpu_memory / 2.6, 2, 16)
        anchors = tuple(max(8, round(side * min_size / 800)) for side in (32, 64, 128, 256, 512))
        return Sizes(224, batch, max(128, min_size), ims, anchors, _SEEDS[budget], 1)
    most = {"quick": 256, "hour": 384, "night": 512}[budget]
    wanted = min(_OBJECT_PIXELS / max(data.objects[4], 1e-3), max(128.0, data.short_side), most)
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
    # The checks and each detector open all labelled pictures, since damaged ones are left out.
    num_opened = (1 + num_detectors) * (data.num_train + data.num_test)
    fixed += num_opened * data.decode_seconds / cores
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
    steps = sizes.epochs * (num_pool // sizes.batch)
    workers = 1 if machine.cores <= 2 else min(8, machine.cores // 2)
    bad = num_bad(data.num_pool)
    passes = sizes.iterations * sizes.ims_per_batch / data.num_train
    q = in_one_line
    made_for = machine.text() + (f", budget {budget}" if budget else "")

    # Lines that not every run has.
    part = f'    part: "0:{sizes.part:g}"  # {num_pool} pictures at random: all take too long\n'
    part *= sizes.part < 1
    some = f"    num_eval_images: {sizes.num_eval}  # evenly spread: all take too long\n"
    some *= 0 < sizes.num_eval < data.num_test
    arch = (
        "    arch: {width_per_group: 64, stem_channels: 64, res2_channels: 256}\n"
        "    heads: {projector_hidden_dim: 2048, predictor_hidden_dim: 2048, output_dim: 256}\n"
    ) * (not is_thin)
    seeds = "for intervals" if sizes.seeds > 1 else "gives no interval; detection.seeds=3 does"

    # The detector: the thin one evaluates once, at the end, as VOC's does.
    longest = round(sizes.min_size * (2 if is_thin else 1333 / 800))
    scales = [sizes.min_size]
    solver: dict[str, Any] = {"MAX_ITER": sizes.iterations}
    if is_thin:
        detector = "thin_R50_C4.yaml  # few channels: there is no GPU"
        test: dict[str, Any] = {"EVAL_PERIOD": 0}
    else:
        detector = "voc0712_R50_C4_24k.yaml  # the protocol of VOC, to scale"
        rate = round(0.02 * sizes.ims_per_batch / 16, 5)
        solver |= {"IMS_PER_BATCH": sizes.ims_per_batch, "BASE_LR": rate, "REFERENCE_WORLD_SIZE": 0}
        scales = [round(share * sizes.min_size / 20) for share in range(12, 21)]  # 480 to 800
        test = {"PRECISE_BN": {"NUM_ITER": min(200, max(10, sizes.iterations // 10))}}
    inputs = {"MIN_SIZE_TRAIN": str(tuple(scales)), "MIN_SIZE_TEST": sizes.min_size,
              "MAX_SIZE_TRAIN": longest, "MAX_SIZE_TEST": longest}  # fmt: skip
    anchors = str([list(sizes.anchors)])
    median_object = data.objects[4] * sizes.min_size
    return f"""\
# Made by tools/run_pipeline.sh from two folders, for {made_for}.
# Expected: about {duration(sizes.seconds)}; pretraining {duration(sizes.pretrain_seconds)}, \
{_NUM_ARMS * sizes.seeds} detectors {duration(sizes.detection_seconds)}.
# Change what you like (docs/pipeline.md) and go on, which repeats only what the change touches:
#   bash tools/run_pipeline.sh THIS_FILE --out ITS_FOLDER
name: {q(name)}
data:
  kind: existing
  dataset: {q(str(data.labels))}  # {data.num_train} + {data.num_test} pictures
  pool: {q(str(data.pool))}  # {data.num_pool} pictures
  pool_split: {q(data.pool_split)}
shards:
  options:
    resize_short: {max(160, sizes.image_size * 8 // 7)}  # views are {sizes.image_size} px
    max_bad: {bad}  # damaged pictures at most; they are listed
{part}\
pretrain:
  config: configs/pretrain/demo.yaml
  overrides:
{arch}\
    # Batch: three or more in an epoch, {"128" if is_thin else "what the GPU holds, 256"} at most.
    data: {{image_size: {sizes.image_size}, batch_size: {sizes.batch}, num_workers: {workers}}}
    optim: {{epochs: {sizes.epochs}, warmup_epochs: {max(1, sizes.epochs // 20)}}}  # {steps} steps
    eval: {{knn_every_epochs: {max(1, sizes.epochs // 4)}}}
detection:
  config: configs/detection/{detector}
  options:
    train_split: {q(data.train_split)}
    test_split: {q(data.test_split)}
    max_left_out: {data.max_left_out}  # faulty pictures and objects at most; they are counted
{some}\
  overrides:
    # Short sides are {data.short_side:.0f} px; the median object has {median_object:.0f} px here.
    INPUT: {q(inputs)}
    MODEL: {{ANCHOR_GENERATOR: {{SIZES: {q(anchors)}}}}}  # from small to large objects
    SOLVER: {q(solver)}  # {passes:.0f} passes
    TEST: {q(test)}
  seeds: {sizes.seeds}  # {seeds}
  arms: [random, pretrained]
  parallel: {sizes.parallel}
"""


def prepare(
    images: Path | None,
    labels: Path,
    out: Path,
    budget: str,
    overrides: Sequence[str] = (),
    *,
    is_dry: bool,
) -> str:
    """The YAML of a run of two folders; the one that it holds already, or else what is chosen.

    Args:
        images: See `survey`.
        labels: See `survey`.
        out: Folder of the run.
        budget: A key of `BUDGETS`.
        overrides: `key=value`, written into the YAML.
        is_dry: Whether nothing is written.
    Raises:
        UserError: See `survey`; if `out` is of other folders or another budget, or an override
            is wrong.
    """

    def say(text: str) -> None:
        print(printable(text), flush=True)

    given = read_settings(PipelineConfig, None, overrides)  # before anything is measured
    images, labels = images and images.absolute(), labels.absolute()
    for option, folder in (("--images", images), ("--labels", labels)):
        is_inside = folder is not None and out.resolve().is_relative_to(folder.resolve())
        require(not is_inside, f"--out {out}: lies in {option} {folder}; give a folder elsewhere")
    made_from = {"images": images and str(images), "labels": str(labels), "budget": budget}
    header = f"# {in_one_line(made_from)}\n"
    file = out / YAML_FILE

    def changed(text: str) -> str:
        """With the overrides; what was there before follows as comments."""
        body, mark, before = text.partition(_BEFORE)
        made = with_overrides(PipelineConfig, body, overrides)
        if made == body:
            return text
        lines = body.removeprefix(header).splitlines()
        given = [line for line in lines if line.startswith(_GIVEN)]
        given += [f"{_GIVEN}{printable(word)}" for word in overrides]
        before = before if mark else "\n".join(f"# {line}".rstrip() for line in lines) + "\n"
        return "\n".join([header + given[0], *given[1:], made + _BEFORE + before])

    if file.is_file():
        text = read_text(file)
        again = shlex.join(["bash", "tools/run_pipeline.sh", str(file), "--out", str(out)])
        require(
            text.startswith(header),
            f"{file}: was made from other folders or another budget; go on with `{again}` (where a "
            "folder has moved, change its path in that file), or choose another --out",
        )
        say(f"settings: {file}, as it stands")
        new = changed(text)
        if new != text and not is_dry:
            write_text(file, new)
        return new

    try:
        data, machine = survey(images, labels, joined_options(given)), this_machine()
    except UserError as error:
        raise UserError(as_settings(str(error))) from None
    more = f" ({', '.join(data.classes[:5])}{', ..' * (len(data.classes) > 5)})"
    say(f"pictures: {data.pool}: {data.num_pool} to pretrain on")
    say(f"labels:   {labels}: {data.num_train} to train on, {data.num_test} to evaluate, "
          f"{len(data.classes)} classes{more}")  # fmt: skip
    for note in data.notes:
        say(f"note:     {as_settings(note)}")
    say(f"machine:  {machine.text()}; measuring steps ..")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", out.name).strip("-.") or "own"
    sizes = choose(data, machine, budget, name, out)
    kind = "ResNet-50" if machine.gpu_memory else "thin ResNet-50"
    say(f"plan:     {kind}, {sizes.num_pool} pictures at {sizes.image_size} px, {sizes.epochs} "
          f"epochs of batch {sizes.batch}: about {duration(sizes.pretrain_seconds)}\n"
          f"          {_NUM_ARMS * sizes.seeds} detectors, {sizes.min_size} px, {sizes.iterations} "
          f"iterations of {sizes.ims_per_batch}: about {duration(sizes.detection_seconds)}\n"
          f"          whole run: about {duration(sizes.seconds)} of {duration(BUDGETS[budget])} "
          f"(--budget {budget})")  # fmt: skip
    if sizes.seconds > BUDGETS[budget]:
        say(f"note:     that is more than --budget {budget}: less would not train at all")
    text = changed(header + to_yaml(data, machine, sizes, name, budget))
    if not is_dry:
        out.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
        say(f"settings: {file}, with the reason of each size")
    return text
