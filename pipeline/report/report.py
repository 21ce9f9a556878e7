"""Writes `report.html`: one page that needs nothing but itself."""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from common.errors import UserError, run_command
from common.files import is_number, write_text
from pipeline import results
from pipeline.config import ARMS
from pipeline.progress import clock
from pipeline.report import charts
from pipeline.report import report_data as data
from pipeline.report.charts import Series
from pipeline.stages import RUN_FILE

HERE = Path(__file__).resolve().parent
DASH = "\u2013"
CURVES = {  # title, what it says, whether its axis starts at 0
    "loss": ("Loss", "the objective that is minimised", False),
    "knn_top1": ("kNN top-1", "accuracy of a nearest-neighbour probe on unseen pictures", True),
    "feature_std": ("Feature deviation", "near 0: all features have collapsed", True),
    "effective_rank": ("Effective rank", "number of directions that the features use", False),
    "fa_cosine": ("FA cosine", "how near augmented features stay to their originals", False),
    "neighbour_age": ("Age of neighbours", "steps since the nearest queue entry came in", True),
    "self_hit_rate": ("Self-hits", "share of nearest entries that show the same picture", True),
    "neighbour_label_agreement": (
        "Labels of neighbours", "share of nearest entries of its class", True,
    ),
    "lr": ("Learning rate", "warm-up, then cosine decay", False),
    "images_per_second": ("Images per second", "throughput of the loop", True),
    "data_wait_share": ("Wait for data", "share of the time spent waiting for pictures", True),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Write the report of a run's folder."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: .venv/bin/python pipeline/report/report.py runs/demo",
    )
    parser.add_argument("out", type=Path, metavar="DIR", help="folder of a pipeline's run")
    options = parser.parse_args(arguments)

    def write() -> int:
        text = render(options.out)
        write_text(options.out / "report.html", text)
        print(f"{options.out / 'report.html'}: {len(text.encode()) / 1e6:.2f} MB")
        return 0

    return run_command(write)


def render(out: Path) -> str:
    """The page of a run.

    Raises:
        UserError: If the folder holds no pipeline's run.
    """
    if not (out / RUN_FILE).is_file():
        raise UserError(f"{out} holds no run: {out / RUN_FILE} is missing")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.ChainableUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": number,
        "signed": signed,
        "clock": lambda value: clock(value) if is_number(value) else DASH,
        "gib": lambda value: f"{value / 2**30:.2f} GiB" if is_number(value) else DASH,
        "scientific": lambda value: f"{value:.1e}" if is_number(value) else DASH,
        "contents": lambda main: re.findall(r'<section id="([^"]+)".*\n *<h2[^>]*>(.*)</h2>', main),
    }
    script = (HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return environment.get_template("report.html.j2").render(
        context(data.PipelineRun.load(out)),
        policy=policy,
        style=Markup(palette() + (HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
    )


def palette() -> str:
    """The colours as CSS: the system's theme, unless one was chosen; light on paper."""
    light, dark = charts.css_variables(charts.LIGHT), charts.css_variables(charts.DARK)
    return (
        f":root {{ color-scheme: light; {light} }}\n"
        "@media screen and (prefers-color-scheme: dark) {\n"
        f'  :root:not([data-theme="light"]) {{ color-scheme: dark; {dark} }}\n}}\n'
        f'@media screen {{ :root[data-theme="dark"] {{ color-scheme: dark; {dark} }} }}\n'
    )


def number(value: Any, digits: int = 1) -> str:
    """A number for a table; a dash where there is none."""
    return f"{value:.{digits}f}" if is_number(value) else DASH


def signed(value: Any, digits: int = 1) -> str:
    """A number with its sign (a true minus); a dash where there is none."""
    return f"{value:+.{digits}f}".replace("-", "\u2212") if is_number(value) else DASH


def context(run: data.PipelineRun) -> dict[str, Any]:
    """Everything that the template shows of the run itself."""
    record, summary = run.record, run.results["summary"]
    stages = data.stage_rows(run)
    detection = run.results["detection"]
    has_coco = any(summary[arm][metric]["n"] for arm in ARMS for metric in results.COCO_METRICS)
    pretrained = run.finished("pretrain")
    errors = data.error_rows(run)
    bars = [(row["title"], {k: row["counts"][k] for k in data.ERROR_KINDS}) for row in errors]
    return {
        "name": record.get("name") or run.out.name,
        "record": record,
        "command": " ".join(record.get("command") or []),
        "config": yaml.safe_dump(record.get("config") or {}, sort_keys=False, allow_unicode=True),
        "metrics": results.ALL_METRICS if has_coco else results.METRICS,
        "verdicts": [v for p in results.PAIRS if (v := results.verdict(run.results, p))],
        "arms": arm_rows(detection),
        "arm_titles": data.ARM_TITLES,
        "pairs": [pair | pair_charts(run, pair) for pair in paired(detection)],
        "pictures": data.detection_pictures(run, detection, "detections.json", run.dataset()),
        "sentence": data.sentence,
        "kinds": data.ERROR_KINDS,
        "errors": errors,
        "error_chart": charts.stacked_bars("Kinds of detections", bars, "best-scored detections"),
        "confusions": data.confusion_rows(errors),
        "other_sets": [
            other | {"arms": arm_rows(other["detection"]), "pairs": paired(other["detection"])}
            for other in data.other_sets(run)
        ],
        "pretrain": run.json("pretrain/summary.json") if pretrained else {},
        "curves": pretraining_charts(run) if pretrained else [],
        "alarms": data.collapse_alarms(run),
        "views": data.picture_rows(run, "views") if pretrained else [],
        "neighbours": data.neighbours(run) if pretrained else {},
        "feature_map": data.embed(run.out / "pretrain/pictures/feature_map.png", 1400)
        if pretrained
        else None,
        "skipped": data.skipped_groups(data.skipped_of_pipeline(run)),
        "card": run.json("convert/backbone.json") if run.finished("convert") else {},
        "dataset": run.json("data/dataset.json"),
        "stages": stages,
        "total_seconds": sum(row["seconds"] or 0.0 for row in stages),
        "peak_memory": max((row["memory"] or 0 for row in stages), default=0),
    }


def arm_rows(detection: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row per arm that ran, with mean and deviation of every metric."""
    return [
        {"arm": arm, "title": data.ARM_TITLES[arm], "metrics": results.summarise(detection[arm])}
        for arm in ARMS
        if detection[arm]
    ]


def paired(detection: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Paired differences and AP of every class, of each pair of which an arm ran."""
    return [
        {
            "id": pair,
            "title": results.PAIR_TITLES[pair],
            "difference": results.compare(detection, *results.PAIRS[pair]),
            "classes": data.per_class_rows(detection, pair),
        }
        for pair, arms in results.PAIRS.items()
        if any(detection[arm] for arm in arms)
    ]


def pair_charts(run: data.PipelineRun, pair: Mapping[str, Any]) -> dict[str, Any]:
    """What is drawn of a pair of arms of the run itself, and precision by class."""
    title = pair["title"].lower()
    ap_lines = []
    for tone, (seeds, mean) in data.ap_curves_of_pair(run, pair["id"], "AP50").items():
        dash = "--" if tone == "random" else "-"
        if len(seeds) > 1:
            ap_lines += [
                Series("", points, tone, thin=True, dash=dash) for points in seeds.values()
            ]
        ap_lines.append(Series(tone, mean, tone, dash=dash))
    classes = []
    for name, random, pretrained in pair["classes"]:
        bar = None if random is None or pretrained is None else (random, pretrained)
        classes.append((name, [] if random is None else [random], pretrained, bar))
    treated, control = (data.precision_curves(run, arm) for arm in results.PAIRS[pair["id"]])
    curves = {name: (control.get(name), treated.get(name)) for name in sorted(control | treated)}
    means = [data.mean_levels(list(by_class.values())) for by_class in (control, treated)]
    return {
        "ap_curve": charts.line_chart(
            f"AP50 over training iterations, {title}", ap_lines, "iterations", from_zero=True
        ),
        "slope": charts.slope_chart(
            f"AP50 of every seed, {title}",
            data.seed_rows(run.results["detection"], pair["id"], "AP50"),
        ),
        "by_class": charts.interval_chart(
            f"AP per class, {title}", classes, "AP", ("random", "pretrained")
        ),
        "precision": charts.line_chart(
            f"Precision over recall, mean over the classes, {title}",
            [
                Series("random", data.reached(means[0]), "random", dash="--"),
                Series("pretrained", data.reached(means[1])),
            ],
            "recall",
            from_zero=True,
        ),
        "precision_rows": [
            (name, *map(data.precision_figures, both)) for name, both in curves.items()
        ],
    }


def pretraining_charts(run: data.PipelineRun) -> list[tuple[str, str, Markup]]:
    """(title, what it says, chart) of every metric that was logged, and of the cosines."""
    curves, outlines = data.metric_curves(run), data.last_histogram(run)
    drawn = [
        (title, about, charts.line_chart(title, [Series(title, curves.get(key, []))], "epoch",
                                         from_zero=from_zero))
        for key, (title, about, from_zero) in CURVES.items()
    ]  # fmt: skip
    over_time, at_the_end = [], []
    for name, key, tone, dash in (
        ("positives", "positive_cosine", "pretrained", "-"),
        ("negatives", "negative_cosine", "random", "--"),
    ):
        means, stds = curves.get(key) or [], dict(curves.get(f"{key}_std") or [])
        band = [(x, max(y - stds[x], -1), min(y + stds[x], 1)) for x, y in means if x in stds]
        over_time.append(Series(name, means, tone, dash=dash, band=band))
        at_the_end.append(Series(name, outlines.get(name) or [], tone, dash=dash))
    about = "mean and deviation; positives: two views of one picture, negatives: of two pictures"
    title = "Cosine of pairs of views"
    drawn.append((title, about, charts.line_chart(title, over_time, "epoch")))
    about = "share of the pairs in each bin, last batch that was looked at"
    title = "Cosines at the end"
    chart = charts.line_chart(title, at_the_end, "cosine", from_zero=True)
    drawn.append((title, about, chart))
    return [(title, about, chart) for title, about, chart in drawn if chart is not None]


if __name__ == "__main__":
    sys.exit(main())
