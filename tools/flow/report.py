"""Writes `report.html`: one page that needs nothing but itself."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import jinja2
import yaml

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.flow import charts, gallery, results
from tools.flow import report_data as data
from tools.flow.charts import Series
from tools.flow.files import write_text
from tools.flow.progress import clock

DASH = "\u2013"
HERE = Path(__file__).resolve().parent
PAIR_TITLES = {"fine_tuned": "Fine-tuned", "frozen": "Backbone frozen"}
CURVES = {
    "loss": ("Loss", "the objective that is minimised"),
    "knn_top1": ("kNN top-1", "accuracy of a nearest-neighbour probe on unseen pictures"),
    "feature_std": ("Feature deviation", "near 0 would mean that all features have collapsed"),
    "effective_rank": ("Effective rank", "number of directions that the features use"),
    "fa_cosine": ("FA cosine", "how near the augmented features stay to their originals"),
    "neighbour_age": ("Age of neighbours", "steps since the nearest queue entry came in"),
    "self_hit_rate": ("Self-hits", "share of nearest entries that show the same picture"),
    "neighbour_label_agreement": ("Labels of neighbours", "share of nearest entries of its class"),
    "lr": ("Learning rate", "warm-up, then cosine decay"),
    "images_per_second": ("Images per second", "throughput of the loop"),
    "data_wait_share": ("Wait for data", "share of the time in which the loop waits for pictures"),
}
FROM_ZERO = (
    "knn_top1", "images_per_second", "data_wait_share", "feature_std", "neighbour_age",
    "self_hit_rate", "neighbour_label_agreement",
)  # fmt: skip
PAIRS_OF_VIEWS = (("positives", "positive_cosine", "plain"),
                  ("negatives", "negative_cosine", "negative"))  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Write the report of a run's folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: .venv/bin/python tools/flow/report.py runs/demo"
    )
    parser.add_argument("out", type=Path, metavar="DIR", help="folder of a run")
    out = parser.parse_args(arguments).out
    if not (out / "stages.json").is_file():
        print(f"error: {out} holds no run: {out / 'stages.json'} is missing", file=sys.stderr)
        return 2
    page = render(out)
    write_text(out / "report.html", page)
    print(f"{out / 'report.html'}: {len(page.encode()) / 1e6:.2f} MB")
    return 0


def render(out: Path) -> str:
    """Return the page of a run."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "signed": signed,
        "clock": lambda value: clock(value) if data.is_number(value) else DASH,
        "gib": lambda value: f"{value / 2**30:.2f} GiB" if data.is_number(value) else DASH,
        "scientific": lambda value: f"{value:.1e}" if data.is_number(value) else DASH,
    }
    environment.globals |= {"sentence": gallery.sentence, "metrics": results.METRICS}
    run = data.Run.load(out)
    style = (HERE / "report.css").read_text(encoding="utf-8")
    script = (HERE / "report.js").read_text(encoding="utf-8")
    template = environment.get_template("report.html.j2")
    return template.render(**context(run), style=style, script=script)


def context(run: data.Run) -> dict[str, Any]:
    """Return everything that the template shows."""
    ledger = run.ledger
    pretrained = run.finished("pretrain")
    stages = data.stage_rows(run)
    return {
        "name": ledger.get("name") or run.out.name,
        "called": ledger.get("called"),
        "commit": ledger.get("commit"),
        "versions": ledger.get("versions") or {},
        "machine": ledger.get("machine") or {},
        "command": " ".join(ledger.get("command") or []),
        "config": yaml.safe_dump(ledger.get("config") or {}, sort_keys=False, allow_unicode=True),
        "verdicts": [v for p in results.PAIRS if (v := results.verdict(run.results, p))],
        "arms": data.arm_rows(run),
        "pairs": pair_sections(run),
        "results": run.results,
        "pretrain": run.json("pretrain/summary.json") if pretrained else {},
        "curves": pretraining_charts(run) if pretrained else [],
        "similarities": similarity_charts(run) if pretrained else [],
        "alarms": data.collapse_alarms(run) if (run.out / "pretrain").is_dir() else [],
        "views": data.picture_rows(run, "views") if pretrained else [],
        "neighbours": data.picture_rows(run, "neighbours") if pretrained else [],
        "shots": data.detection_pictures(run, shown_pair(run)),
        "shots_pair": PAIR_TITLES[shown_pair(run)].lower(),
        "arm_words": data.ARM_WORDS,
        "card": run.json("convert/backbone.json") if run.finished("convert") else {},
        "dataset": run.json("data/dataset.json"),
        "stages": stages,
        "total_seconds": sum(row["seconds"] or 0.0 for row in stages),
        "peak_memory": max((row["memory"] or 0 for row in stages), default=0),
        "left_out": data.skipped_inputs(run),
        "bad_samples": data.bad_samples(run),
    }


def shown_pair(run: data.Run) -> str:
    """Return the pair whose detections are drawn: fine-tuned where it ran."""
    fine_tuned = any(run.results["detection"][arm] for arm in results.PAIRS["fine_tuned"])
    return "fine_tuned" if fine_tuned else "frozen"


def pair_sections(run: data.Run) -> list[dict[str, Any]]:
    """Return charts and tables of each pair of arms that ran."""
    sections = []
    for pair, (treated, control) in results.PAIRS.items():
        if not (run.results["detection"][treated] or run.results["detection"][control]):
            continue
        title = PAIR_TITLES[pair]
        classes = data.per_class_rows(run, pair, "per_class")
        sections.append(
            {
                "id": pair,
                "title": title,
                "difference": run.results["differences"][pair],
                "ap_curve": ap_chart(run, pair),
                "slope": seed_chart(run, pair),
                "classes": classes,
                "dumbbell": charts.dumbbell_chart(f"AP per class, {title.lower()}", classes),
            }
        )
    return sections


def ap_chart(run: data.Run, pair: str) -> charts.Markup | None:
    """Return AP50 over iterations: every seed thin, the mean thick."""
    treated, control = results.PAIRS[pair]
    lines = []
    for arm, tone in ((control, "random"), (treated, "pretrained")):
        curves = data.ap_curves(run, arm, "AP50")
        if len(curves) > 1:
            lines += [Series(f"{tone}, seed {s}", c, tone, thin=True) for s, c in curves.items()]
        lines.append(Series(tone, data.mean_curve(list(curves.values())), tone))
    title = f"AP50 over training iterations, {PAIR_TITLES[pair].lower()}"
    return charts.line_chart(title, lines, "iterations", from_zero=True)


def seed_chart(run: data.Run, pair: str) -> charts.Markup | None:
    """Return AP50 of every seed in both arms."""
    treated, control = (
        results.values(run.results["detection"][arm], "AP50") for arm in results.PAIRS[pair]
    )
    seeds = sorted(treated.keys() & control.keys())
    title = f"AP50 of every seed, {PAIR_TITLES[pair].lower()}"
    return charts.slope_chart(title, [(f"seed {s}", control[s], treated[s]) for s in seeds])


def pretraining_charts(run: data.Run) -> list[dict[str, Any]]:
    """Return a chart for every metric that was logged."""
    curves = data.metric_curves(run)
    found = []
    for key, (title, about) in CURVES.items():
        points = curves.get(key) or []
        zero = key in FROM_ZERO
        chart = charts.line_chart(title, [Series(title, points)], "epoch", from_zero=zero)
        if chart is not None:
            first, last = (charts.short_number(points[i][1]) for i in (0, -1))
            found.append(
                {"title": title, "about": about, "chart": chart, "first": first, "last": last}
            )
    return found


def similarity_charts(run: data.Run) -> list[dict[str, Any]]:
    """Return how similar two views of one picture, and of two pictures, are to the loss."""
    curves, outlines = data.metric_curves(run), data.last_histogram(run)
    over_time, at_the_end = [], []
    for name, key, tone in PAIRS_OF_VIEWS:
        means, stds = curves.get(key) or [], dict(curves.get(f"{key}_std") or [])
        band = [(x, max(y - stds[x], -1), min(y + stds[x], 1)) for x, y in means if x in stds]
        over_time.append(Series(name, means, tone, band=band))
        at_the_end.append(Series(name, outlines.get(name) or [], tone))
    time_title, end_title = "Cosine of pairs of views", "Cosines at the end"
    drawn = (
        (time_title, "mean, and standard deviation over the pairs",
         charts.line_chart(time_title, over_time, "epoch")),
        (end_title, "share of the pairs in each bin, last batch that was looked at",
         charts.line_chart(end_title, at_the_end, "cosine", from_zero=True)),
    )  # fmt: skip
    return [
        {"title": title, "about": about, "chart": chart} for title, about, chart in drawn if chart
    ]


def number(value: Any, digits: int = 1) -> str:
    """Return a number for a table; a dash where there is none."""
    return f"{value:.{digits}f}" if data.is_number(value) else DASH


def signed(value: Any, digits: int = 1) -> str:
    """Return a number with its sign (a true minus); a dash where there is none."""
    if not data.is_number(value):
        return DASH
    return f"{value:+.{digits}f}".replace("-", "\u2212")


if __name__ == "__main__":
    sys.exit(main())
