"""The figures of a run, gathered from the files that its stages left: `results.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import files, stats
from common.errors import UserError, require
from common.picture_draws import METRICS, Draws, interval, read_draws
from common.stats import mean_std, paired_difference
from pipeline.config import ARMS, FROZEN
from pipeline.plan import read_run

COCO_METRICS = ("coco_AP", "coco_AP50", "coco_AP75")  # by COCO's metric, on the same boxes
ALL_METRICS = (*METRICS, *COCO_METRICS)
Measured = Mapping[str, Mapping[str, Mapping[int, float]]]
"""Metric -> variant or arm -> seed -> value."""
Detection = Mapping[str, Sequence[Mapping[str, Any]]]
"""Rows of each arm, one a seed."""
AllDraws = Mapping[str, Mapping[int, Draws]]
"""Arm -> seed -> its figures in every draw of the pictures; all of the same pictures."""
_FORMS: dict[str, tuple[str, files.Form]] = {
    "data": ("dataset.json", {}),
    "shards": ("index.json", {}),
    "pretrain": ("summary.json", {}),
    "linear": ("linear.json", {}),
    "convert": ("backbone.json", {}),
    "detection": ("result.json", dict.fromkeys(METRICS, files.NUMBER)),
}
"""Kind of a stage -> the file that tells its figures, and what that must have."""
TITLES = {"AP50": "AP50", "linear": "linear top-1", "knn": "kNN top-1"}
"""The metrics that decide, the most important one first."""
_FROZEN_TOO = FROZEN.replace("_", ", ")  # after the name of a comparison of frozen arms
_DEFINITION = ("name", "title", "claim", "left_out")  # of a table, handed on
NEAR_ZERO = 3.0  # points of AP50, below which a detector has hardly learnt anything
PAIRS = {"fine_tuned": ("pretrained", "random"), "frozen": ("pretrained_frozen", "random_frozen")}


def assemble(out: Path) -> dict[str, Any]:
    """Return the figures of the run in `out`; what did not run is empty or None."""
    run = read_run(out)
    plan, good = run.get("plan") or [], finished_stages(run)

    def left_by(stage: str) -> dict[str, Any]:
        return (read_figures(out, stage) if stage in good else None) or {}

    pretrain, card = left_by("pretrain"), left_by("convert")
    detection: dict[str, list[dict[str, Any]]] = {arm: [] for arm in (*ARMS, *run.get("arms", ()))}
    kept = ("per_class", "per_class_AP50", "iterations", "seconds", "num_threads")
    for arm, rows in detection.items():
        seeds = (name.rpartition("/seed-")[2] for name in good if name.startswith(f"{arm}/"))
        for seed in sorted(map(int, seeds)):
            result = read_figures(out, f"{arm}/seed-{seed}")
            if result is not None:
                rows.append(seed_row(seed, result, (*kept, "peak_memory_bytes")))
    results = {
        "format": "fa-results-1",
        "name": run.get("name"),
        "detection": detection,
        "pretrain": {"images_per_second": None, "knn_top1": None} | pretrain,
        "conversion": {
            key: card.get(key) for key in ("max_relative_difference", "stages", "seconds")
        },
        "stages": {
            name: {"skipped": record.get("skipped", False)}
            | {key: record.get(key) for key in ("seconds", "peak_memory_bytes")}
            for name, record in good.items()
        },
        "damaged": damaged_files(out, good)
        + [
            {"stage": name, "file": f"stages/{name}.json", "fault": "is damaged; it runs again"}
            for name in plan
            if name in run["damaged"]
        ],
        "unfinished": [name for name in plan if name not in good],
        "versions": run.get("versions") or {},
        "commit": run.get("commit"),
        "summary": {arm: summarise(rows) for arm, rows in detection.items()},
        "differences": {pair: compare(detection, *arms) for pair, arms in PAIRS.items()},
    }
    others = {name.removeprefix("pretrain/"): left_by(name)
              for name in good if name.startswith("pretrain/")}  # fmt: skip
    if others:  # variant/seed-N, or the variant alone
        results["pretrainings"] = others
    sets = other_sets(out, run.get("tables"), detection)
    if sets:
        results["other_sets"] = sets
    if run.get("tables"):
        config = run.get("config") or {}
        seeds = config.get("seeds")
        is_pretrained_anew = isinstance(seeds, dict) and bool(seeds.get("pretraining"))
        found = measured(out, good) | by_metric(detection)
        if "knn" not in config.get("evaluations", ["knn"]):
            found.pop("knn", None)
        results |= {
            "rule": stats.RULE,
            "question": str(config.get("question") or ""),
            "seeds_of": "pretraining" if is_pretrained_anew else "detector",
            "tables": [
                make_table(table, found, metric) for table in run["tables"] for metric in found
            ],
            "failures": [
                {"stage": name, "label": record["label"], "reason": record["error"]}
                for name, record in run["stages"].items()
                if name in plan and record["status"] == "failed"
            ],
            # More than one: figures of the table may not agree.
            "commits": sorted({str(r["commit"]) for r in good.values() if r.get("commit")}),
        }
    return results


def make_table(
    table: Mapping[str, Any], found: Measured, metric: str, draws: AllDraws | None = None
) -> dict[str, Any]:
    """Return a table by one metric.

    Args:
        table: A `TableConfig` as plain values.
        found: See `Measured`.
        metric: Of `found`.
        draws: Of a set whose pictures were resampled: then rows and comparisons also have
            `picture_interval`, None if a seed has no draws or the metric none.
    Returns:
        `name`, `title`, `claim`, `metric`, `left_out`; `rows`: `label`, `variant`, `n`, `mean`,
        `std`, `values` by seed; `comparisons`: see `stats.compare`, and `terms`, the weight of each
        variant; comparisons of variants whose frozen arms were trained come once more, of these;
        `verdict` on the claim.
    """
    values = found[metric]

    def over_pictures(terms: Mapping[str, float], seeds: Iterable[int]) -> dict[str, Any]:
        """The interval of a weighted sum of variants, mean over seeds."""
        if draws is None:
            return {}
        try:
            figures = [np.sum([weight * draws[variant][seed][metric]
                               for variant, weight in terms.items()], axis=0)
                       for seed in seeds]  # fmt: skip
        except KeyError:
            return {"picture_interval": None}
        return {"picture_interval": interval(figures)}

    rows = []
    for label, variant in table["rows"].items():
        by_seed = dict(sorted(values.get(variant, {}).items()))
        row = {"label": label, "variant": variant, "values": by_seed}
        row |= mean_std(list(by_seed.values()))
        rows.append(row | over_pictures({variant: 1}, by_seed))
    contrasts, sides = [], []
    for ending in ("", FROZEN):
        for item in table["comparisons"]:
            if not ending or all(variant + ending in values for variant in item["terms"]):
                terms = ((w, values.get(v + ending, {})) for v, w in item["terms"].items())
                name = item["name"] + _FROZEN_TOO * bool(ending)
                contrasts.append(stats.Contrast(name, tuple(terms), item["decides"]))
                sides.append({v + ending: w for v, w in item["terms"].items()})
    compared = stats.compare(contrasts)
    for row, side in zip(compared, sides, strict=True):
        row |= {"terms": side} | over_pictures(side, row["seeds"])
    kept = {key: table[key] for key in _DEFINITION}
    judged = {"comparisons": compared, "verdict": stats.claim_verdict(compared)}
    return kept | {"metric": metric, "rows": rows} | judged


def arm_tables(
    title: str, detection: Detection, draws: AllDraws | None = None
) -> list[dict[str, Any]]:
    """The arms that ran, and pretrained - random, as tables by every metric of detection."""
    rows = {arm_title(arm): arm for arm, seeds in detection.items() if seeds}
    name, terms = "pretrained - random", {"pretrained": 1, "random": -1}
    comparisons = [{"name": name, "terms": terms, "decides": True}] * ("pretrained" in detection)
    table = {"name": title, "title": title, "claim": "", "left_out": {}, "rows": rows}
    table |= {"comparisons": comparisons}
    found = by_metric(detection)
    return [make_table(table, found, metric, draws) for metric in found]


def other_sets(
    out: Path, tables: Sequence[Mapping[str, Any]] | None, detection: Detection
) -> list[dict[str, Any]]:
    """The sets that `tools/train_voc.sh --eval-on` evaluated.

    Args:
        out: The run's folder.
        tables: Those of the run; None: its arms are compared.
        detection: The seeds that count.
    Returns:
        `name`; `tables`, see `make_table`; `outdated`: seeds that were trained again since, as
        "arm/seed-N", which count nowhere; `without_draws`: those that count, but have no draws of
        the pictures that most have.
    """
    stems = {path.stem for path in out.glob("detection/*/seed-*/eval-on-*.json")}
    beside = {stem + end for stem in stems for end in ("-pr", "-errors", "-detections", "-draws")}
    sets = []
    for stem in sorted(stems - beside):
        rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in detection}
        drawn: dict[tuple[str, int], tuple[Draws | None, tuple[Any, Any]]] = {}
        outdated = []
        for arm, seed in [(key, row["seed"]) for key in detection for row in detection[key]]:
            name = f"{arm}/seed-{seed}"
            path = out / f"detection/{name}/{stem}.json"
            model = path.with_name("model_final.pth")
            result = files.read_record_or_none(path)
            if result is None:  # not evaluated there, or damaged, see `damaged_files`
                continue
            # Without a model the folder is a copy of the figures alone.
            is_newer = model.is_file() and model.stat().st_mtime > path.stat().st_mtime
            if is_newer and files.sha256_of(model) != result.get("model_sha256"):
                outdated.append(name)
                continue
            rows[arm].append(seed_row(seed, result, ()))
            found = read_draws(path.with_name(f"{stem}-draws.json"), result)
            pictures = result.get("data_sha256"), result.get("num_test_images")
            drawn[arm, seed] = (found, pictures)
        draws: dict[str, dict[int, Draws]] = {arm: {} for arm in detection}
        usual = Counter(pictures for found, pictures in drawn.values() if found).most_common(1)
        for (arm, seed), (found, pictures) in drawn.items():
            if found and pictures == usual[0][0]:
                draws[arm][seed] = found
        without_draws = [f"{arm}/seed-{seed}" for arm, seed in drawn if seed not in draws[arm]]
        title, figures = stem.removeprefix("eval-on-"), by_metric(rows)
        named = {"name": title, "title": title, "claim": ""}
        made = [make_table({**table, **named}, figures, metric, draws)
                for table in tables or () for metric in figures]  # fmt: skip
        made = made or arm_tables(title, rows, draws)
        sets.append({"name": title, "tables": made, "outdated": outdated,
                     "without_draws": without_draws})  # fmt: skip
    return sets


def arm_title(arm: str) -> str:
    """An arm's name for people."""
    name = arm.removesuffix(FROZEN)
    name = {"random": "Random", "pretrained": "Pretrained"}.get(name, name)
    return name + ", backbone frozen" * arm.endswith(FROZEN)


def finished_stages(run: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Finished stages of the plan whose records speak of the present settings."""
    return {
        name: record
        for name in run.get("plan") or ()
        if (record := run["stages"].get(name)) and record.get("status") == "finished"
        if record.get("current")
    }


def folder_of(stage: str) -> str:
    """The folder of a stage, relative to the run's."""
    return stage if _kind_of(stage) != "detection" else f"detection/{stage}"


def _kind_of(stage: str) -> str:
    """A stage's kind by its name, also of records that do not tell it."""
    kind = stage.partition("/")[0].replace("probe_train", "shards").replace("probe_val", "shards")
    return kind if kind in _FORMS or "/seed-" not in stage else "detection"


def read_figures(out: Path, stage: str) -> dict[str, Any] | None:
    """The file that tells a stage's figures; None where it is missing or damaged."""
    file, form = _FORMS[_kind_of(stage)]
    return files.read_record_or_none(out / folder_of(stage) / file, form)


def damaged_files(
    out: Path, stages: Iterable[str], *, has_details: bool = False
) -> list[dict[str, str]]:
    """Files of finished stages whose content is missing from the figures.

    Args:
        out: The run's folder.
        stages: Which ones.
        has_details: Whether files that only the page reads count too; those of pretraining runs are
            told by `runs.read`.
    Returns:
        `stage`, `file` (relative to the run's folder), `fault`: what is wrong, and the remedy.
    """
    found = []

    def add(stage: str, path: Path, fault: str) -> None:
        place = path.relative_to(out).as_posix()
        found.append({"stage": stage, "file": place, "fault": fault})

    for stage in stages:
        kind, folder = _kind_of(stage), out / folder_of(stage)
        if kind in _FORMS and read_figures(out, stage) is None:
            path = folder / _FORMS[kind][0]
            state = "is damaged" if path.exists() else "is missing"
            add(stage, path, f"{state}; the command of this run makes it again")
        if has_details and kind in ("detection", "pretrain"):
            pattern = "*.json" if kind == "detection" else "pictures/*.json"
            for path in sorted(folder.glob(pattern)):
                is_own = path.name in (_FORMS[kind][0], "metrics.json")  # the latter has lines
                if not is_own and not isinstance(files.read_json_or_none(path), dict | list):
                    add(stage, path, "is damaged")
        if has_details and kind == "detection":
            path, faults = folder / "curve.jsonl", []
            rows = files.read_json_lines(path, {"iteration": int}, report=faults.append)
            last = (read_figures(out, stage) or {}).get("iterations")
            reached = max((row["iteration"] for row in rows), default=0)
            if not faults and files.is_number(last) and reached < last:
                faults.append("lacks its last points")
            for fault in faults:
                add(stage, path, fault.removeprefix(f"{path} "))
    return found


def measured(out: Path, stages: Collection[str]) -> dict[str, dict[str, dict[int, float]]]:
    """Return the percentages of pretraining that finished stages of a run left, see `Measured`.

    Metrics: `knn`, `linear`. A seed of pretraining that is not named is 0.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for stage in stages:
        kind, _, tail = stage.partition("/")
        variant, _, seed = (tail or "pretrained").partition("/seed-")
        sources = {"pretrain": ("knn", "knn_top1"), "linear": ("linear", "top1")}
        if kind in sources:
            metric, key = sources[kind]
            value = (read_figures(out, stage) or {}).get(key)
            if files.is_number(value):
                found.setdefault(metric, {}).setdefault(variant, {})[int(seed or 0)] = 100 * value
    return found


def by_metric(detection: Detection) -> dict[str, dict[str, dict[int, float]]]:
    """Return the metrics of detection of which there are values, see `Measured`."""
    found = {metric: {arm: values(rows, metric) for arm, rows in detection.items() if rows}
             for metric in ALL_METRICS}  # fmt: skip
    return {metric: by_arm for metric, by_arm in found.items() if any(by_arm.values())}


def write(out: Path, **about: Any) -> None:
    """Write `out/results.json` and each arm's summary over its finished seeds.

    Args:
        out: The run's folder.
        about: Further keys of the results, as `published`, see `study.read_published`.
    """
    results = assemble(out) | about
    files.write_json(out / "results.json", results)
    for arm, rows in results["detection"].items():
        lost = [item["file"] for item in results["damaged"] if item["stage"].startswith(f"{arm}/")]
        if rows or lost:
            table = results["summary"][arm]
            summary: dict[str, Any] = {"n": len(rows), "seeds": [row["seed"] for row in rows]}
            summary |= {key: {m: table[m][key] for m in METRICS} for key in ("mean", "std")}
            if lost:
                summary["damaged"] = lost
            if all(table[m]["n"] == len(rows) for m in COCO_METRICS):
                summary["coco"] = {m.removeprefix("coco_"): table[m]["mean"] for m in COCO_METRICS}
            files.write_json(out / f"detection/{arm}/summary.json", summary)


def seed_row(seed: int, result: Mapping[str, Any], kept: Collection[str]) -> dict[str, Any]:
    """Return the figures of one seed, all metrics side by side; None where one is missing.

    Args:
        seed: Its number.
        result: Content of its result.json, or of its eval-on-NAME.json.
        kept: What else of the result is kept.
    """
    coco = result.get("coco")  # results of older versions have none
    coco = coco if isinstance(coco, dict) else {}
    figures = {**result, **{f"coco_{metric}": coco.get(metric) for metric in METRICS}}
    return {"seed": seed} | {key: figures.get(key) for key in (*ALL_METRICS, *kept)}


def values(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """Return one metric by seed; seeds where it is missing or not a number are left out."""
    return {row["seed"]: float(row[metric]) for row in rows if files.is_number(row.get(metric))}


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return n, mean and standard deviation of every metric of one arm."""
    return {metric: mean_std(list(values(rows, metric).values())) for metric in ALL_METRICS}


def compare(detection: Detection, treated: str, control: str) -> dict[str, Any]:
    """Return the paired differences of every metric, `treated` minus `control`."""
    arms = {"minuend": treated, "subtrahend": control}
    return arms | {
        metric: paired_difference(
            values(detection[treated], metric), values(detection[control], metric)
        )
        for metric in ALL_METRICS
    }


def near_zero(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Labels of a table's rows whose mean is near 0; a frozen backbone may well be so."""
    return [row["label"] for row in rows if row["n"] and row["mean"] < NEAR_ZERO
            and not row["variant"].endswith(FROZEN)]  # fmt: skip


def findings(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the deciding comparisons say, by AP50, linear evaluation and kNN.

    With a question each comparison is an answer of its own, the first one being that of the
    fine-tuned detectors; else a table is.

    Returns:
        `answer`: in short; `text`; `kind`: better, worse, open, or single (one seed: no interval).
        Where AP50 is near 0 everywhere (`kind` missing), this alone is said of AP50.
    """
    found = []
    for table in deciding_tables(results):
        if table["metric"] == "AP50" and (too_low := near_zero(table["rows"])):
            trained = [row["label"] for row in table["rows"]
                       if row["n"] and not row["variant"].endswith(FROZEN)]  # fmt: skip
            if too_low == trained:
                text = (
                    f"AP50 is below {NEAR_ZERO:g} for {', '.join(too_low)}: trained too short to "
                    "compare anything. Raise the detector's SOLVER.MAX_ITER; look at the labels."
                )
                found.append({"kind": "missing", "answer": "AP near 0.", "text": text})
                continue
        deciding = [row for row in table["comparisons"] if row["decides"]]
        groups = [[row] for row in deciding] if results.get("question") else [deciding]
        for group in groups:
            rows = [row for row in group if row["n"]]
            if not rows:
                continue
            verdict = stats.claim_verdict(group)
            kind = {"shown": "better", "contradicted": "worse"}.get(verdict, "open")
            kind = "single" if all(row["n"] == 1 for row in rows) else kind
            answer = {"better": "Yes:", "worse": "No, the contrary:", "open": "Not shown:",
                      "single": "One seed cannot tell:"}[kind]  # fmt: skip
            claim = f"{table['claim']} ({verdict}). " if table["claim"] else ""
            unit = results.get("seeds_of", "detector")
            told = [_told(row, table["metric"], unit, has_verdict=len(group) > 1) for row in rows]
            told += [f"{row['name']}: nothing to compare yet" for row in group if not row["n"]]
            found.append({"kind": kind, "answer": answer, "text": f"{claim}{'; '.join(told)}."})
    return found


def deciding_tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables by metrics that decide; where there is a question the most important one first."""
    tables = results.get("tables") or arm_tables("", results.get("detection", {}))
    deciding = [table for table in tables if table["metric"] in TITLES]
    if results.get("question"):
        deciding.sort(key=lambda table: [*TITLES].index(table["metric"]))
    return deciding


def _told(row: Mapping[str, Any], metric: str, unit: str, *, has_verdict: bool) -> str:
    """A comparison in words: by how much, and how sure."""
    name = row["name"].removesuffix(_FROZEN_TOO)
    text = f"{name} {row['mean']:+.1f} points of {TITLES[metric]}"
    text += " with the backbone frozen, " if row["name"] != name else ", "
    if row["n"] == 1:
        return text + "n = 1, no interval: it may be chance"
    low, high = row["student_t"]
    text += f"95 % interval {low:+.1f} to {high:+.1f}, n = {row['n']} {unit} seeds"
    if row["verdict"] == "inconclusive" and not low <= 0 <= high:
        why = f"p = {row['p_holm']:.2f} after correction for several comparisons"
        few = f"fewer than {stats.MIN_SEEDS} seeds decide nothing"
        return text + f" ({few if row['n'] < stats.MIN_SEEDS else why})"
    return text + f": {row['verdict']}" * has_verdict


def answer_table(results: Mapping[str, Any]) -> dict[str, Any]:
    """The deciding comparisons of a run with a question by all metrics, beside each other.

    Returns:
        `variants`: names; `rows`: `title` of the metric, `means` of the variants (rows of
        `make_table`, None where there is none), `name` of the comparison, `difference`.
    """
    rows: list[dict[str, Any]] = []
    variants: dict[str, None] = {}
    for table in deciding_tables(results) if results.get("question") else ():
        by_variant = {row["variant"]: row for row in table["rows"]}
        variants |= {name: None for name in by_variant if not name.endswith(FROZEN)}
        has_frozen = any(row["name"].endswith(_FROZEN_TOO) for row in table["comparisons"])
        for row in table["comparisons"]:
            if row["decides"] and row["n"]:
                name = row["name"].removesuffix(_FROZEN_TOO)
                ending = FROZEN if row["name"] != name else ""
                how = (", backbone frozen" if ending else ", fine-tuned") * has_frozen
                means = [by_variant.get(variant + ending) for variant in variants]
                rows.append({"title": TITLES[table["metric"]] + how, "means": means, "name": name,
                             "difference": row})  # fmt: skip
    return {"variants": [*variants], "rows": rows}


# -- several runs of one experiment ---------------------------------------------------------------

_JOINED_FORM = {"name": str, "tables": list, "commits": list, "failures": list, "rule": str}
_ABOUT = ("format", "name", "rule", "question", "seeds_of")


def join(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the results of several runs as one: each table over the seeds of all of them.

    Each run has its own seeds, or other variants of the same seeds. What both have must be equal.

    Args:
        paths: Files `results.json` of runs with tables (`ablate`, or a pipeline with variants).
    Returns:
        As `results.assemble` has it: what judges and the tables; `joined_from`: of each file its
        name, commits and seeds.
    Raises:
        UserError: For results without tables, tables that differ in their comparisons, and two
            values of one seed.
    """
    remedy = "give results.json of runs of ablate.py or of a pipeline with variants"
    read = {path: files.read_record(path, _JOINED_FORM, remedy=remedy) for path in paths}
    last = read[paths[-1]]
    for path, results in read.items():
        require(
            results["name"] == last["name"],
            f"{path}: a run of {results['name']!r}, but {paths[-1]} is one of {last['name']!r}",
        )
    definitions: dict[tuple[str, str], dict[str, Any]] = {}
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    origin: dict[tuple[Any, ...], Path] = {}
    for path, results in read.items():
        for table in results["tables"]:
            key = table["name"], table["metric"]
            mine = _definition(table, path)
            known = definitions.setdefault(key, mine)
            require(
                mine["comparisons"] == known["comparisons"],
                f"{path}: the comparisons of the table {table['name']!r} are not those of "
                f"{paths[0]}; join runs of the same settings",
            )
            known["rows"] |= mine["rows"]
            values = found.setdefault(key, {})
            for row in table["rows"]:
                for seed, value in row["values"].items():
                    of_variant = values.setdefault(row["variant"], {})
                    first = origin.setdefault((*key, row["variant"], seed), path)
                    require(
                        of_variant.setdefault(int(seed), value) == value,
                        f"{path}: seed {seed} of {row['label']!r} has {table['metric']} {value:g}, "
                        f"but {of_variant[int(seed)]:g} in {first}; join runs of different seeds",
                    )
    tables = [make_table(definition, {metric: found[name, metric]}, metric)
              for (name, metric), definition in definitions.items()]  # fmt: skip
    return {
        **{key: last.get(key) for key in _ABOUT},
        "tables": tables,
        "failures": [row for results in read.values() for row in results["failures"]],
        "commits": sorted({commit for results in read.values() for commit in results["commits"]}),
        "joined_from": [
            {"file": str(path), "commits": results["commits"], "seeds": _seeds(results)}
            for path, results in read.items()
        ],
    }


def _definition(table: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A table's rows and comparisons, as `make_table` takes them; it adds those of frozen arms."""
    comparisons = []
    for item in table["comparisons"]:
        if "terms" not in item:
            raise UserError(f"{path}: an older version wrote it, without `terms`; run it again")
        if not any(variant.endswith(FROZEN) for variant in item["terms"]):
            comparisons.append({key: item[key] for key in ("name", "terms", "decides")})
    rows = {row["label"]: row["variant"] for row in table["rows"]}
    return {key: table[key] for key in _DEFINITION} | {"rows": rows, "comparisons": comparisons}


def _seeds(results: Mapping[str, Any]) -> list[int]:
    """The seeds of a run that have a value."""
    return sorted({int(seed) for table in results["tables"] for row in table["rows"]
                   for seed in row["values"]})  # fmt: skip
