"""Checks everything that an experiment will need, before its first stage.

Each program checks its own input (`--check --json`) and says what it would do; what they say is
then compared: the pretrained backbone with the detector, the pool with the batch, the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import provenance
from common.errors import EACH, UserError
from common.files import read_json_or_none, write_json
from pipeline.config import PipelineConfig
from pipeline.stages import Stage, digest, key_parts

FILE = "checks.json"


def check(
    config: PipelineConfig,
    stages: Sequence[Stage],
    root: Path,
    out: Path,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Run the checks of some stages, each command once; return what they say, by stage.

    Args:
        config: The settings that the stages were made from.
        stages: Those that will run, or have run.
        root: The repository.
        out: The run's folder; if it is there, checks that passed are kept in it.
        report: Gets a line when checks begin that take a while.
    Raises:
        UserError: Naming all that was found.
    """
    kept = read_json_or_none(out / FILE) or {}
    keys: dict[str, str] = {}  # stage -> key of its check
    commands: dict[str, Stage] = {}
    for stage in stages:
        if stage.check:
            parts = key_parts(stage, root, out, dict.fromkeys(stage.upstream))
            about = {name: parts[name] for name in ("files", "libraries", "code")}
            keys[stage.name] = digest(about | {"check": list(stage.check)})
            if keys[stage.name] not in kept:
                commands.setdefault(keys[stage.name], stage)
    # Each program is started once and checks what all its stages would do.
    by_program: dict[tuple[str, ...], dict[str, Stage]] = {}
    for key, stage in commands.items():
        by_program.setdefault(stage.check[:2], {})[key] = stage
    if commands:
        report(f"checking settings and data of {len(commands)} stages")
    faults = []
    with ThreadPoolExecutor(provenance.usable_cores()) as threads:
        answers = threads.map(lambda mine: _ask(mine, root), by_program.values())
        for mine, told in zip(by_program.values(), answers, strict=True):
            for (key, stage), answer in zip(mine.items(), told, strict=True):
                if "error" in answer:
                    faults.append(f"stage {stage.title}: {answer['error']}")
                else:
                    kept[key] = answer
    facts = {stage: dict(kept[key]) for stage, key in keys.items() if key in kept}
    # The pool is generated, or packed from the user's pictures.
    pools = [told.get("num_pool", told.get("num_pictures")) for name, told in facts.items()
             if name in ("data", "shards")]  # fmt: skip
    pool = next(filter(None, pools), 0)
    for stage in stages:
        told = facts.get(stage.name, {})
        if "seconds_per_sample" in told:
            told["num_samples"] = told["num_samples"] or round(pool * stage.config["pool"])
            told["seconds"] = told["epochs"] * told["num_samples"] * told["seconds_per_sample"]
    faults += _contradictions(config, stages, facts, out)
    if faults:
        raise UserError("nothing was started:\n  " + "\n  ".join(dict.fromkeys(faults)))
    if out.is_dir():
        write_json(out / FILE, kept)
    return facts


def _ask(stages: Mapping[str, Stage], root: Path) -> list[dict[str, Any]]:
    """What the program of some stages says of each of them.

    Raises:
        UserError: If it breaks.
    """
    checks = [stage.check for stage in stages.values()]
    program, words = checks[0][:2], [list(check[2:]) for check in checks]
    done = subprocess.run(
        [*program, EACH], cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
        input=json.dumps(words), capture_output=True, text=True, check=False,
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(answers) < len(words):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the checks of {Path(program[1]).name} broke: {last}")
    return answers


def _contradictions(
    config: PipelineConfig, stages: Sequence[Stage], facts: dict[str, Any], out: Path
) -> list[str]:
    """What fits by itself, but not together."""
    of_kind: dict[str, list[tuple[Stage, dict[str, Any]]]] = {}
    for stage in stages:
        if stage.name in facts:
            of_kind.setdefault(stage.kind, []).append((stage, facts[stage.name]))
    faults = []
    backbones = [*of_kind.get("pretrain", ()), *of_kind.get("convert", ())]
    for stage, backbone in backbones if config.arms else ():
        for _, detector in of_kind.get("detection", ()):
            for name in ("arch", "pixel_mean", "pixel_std", "input_format", "stride_in_1x1"):
                if _differ(backbone[name], detector[name]):
                    faults.append(
                        f"{stage.title} makes a backbone with {name} {backbone[name]}, but "
                        f"detection.config builds {detector[name]}; change one of them"
                    )
        branches = backbone.get("branches", [config.convert.branch])
        if config.convert.branch not in branches:
            faults.append(
                f"convert.branch {config.convert.branch}: {stage.title} has only "
                f"{', '.join(branches)}"
            )
    for stage, told in of_kind.get("pretrain", ()):
        if 0 < told["num_samples"] < told["batch_size"]:
            faults.append(
                f"{stage.title}: data.batch_size {told['batch_size']} is more than the "
                f"{told['num_samples']} pictures of the pool"
            )
    # A stage that is stopped and resumed needs no more: checkpoints are replaced.
    needed = sum(facts[stage.name].get("disk_bytes", 0) for stage in stages if stage.name in facts)
    place = next(path for path in (out, *out.parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        faults.append(
            f"{out}: the stages leave about {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB "
            "are free; free some space, or choose another --out"
        )
    return faults


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return any(abs(a - b) > 0.01 for a, b in zip(one, other, strict=True))
    return one != other
