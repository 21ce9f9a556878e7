"""Writes `report.html`: one page that needs nothing but itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

if __package__ in (None, ""):
    # In place of this folder, whose modules are found through their package.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.errors import UserError, run_command
from common.files import write_text
from tools.flow import (
    charts,
    detection_section,
    features_section,
    other_sets_section,
    page,
    results,
    runs_section,
    skipped,
    studies_section,
)
from tools.flow import report_data as data
from tools.flow import runs as runs_module
from tools.flow.charts import Series

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
        description=__doc__,
        epilog="example: .venv/bin/python tools/flow/report.py runs/demo --studies runs/study",
    )
    parser.add_argument("out", type=Path, metavar="DIR", help="folder of a pipeline's run")
    parser.add_argument(
        "--runs", type=Path, nargs="+", default=[], metavar="DIR", action="extend",
        help="pretraining runs, or folders of such, whose curves are compared with this one's",
    )  # fmt: skip
    parser.add_argument(
        "--studies", type=Path, nargs="+", default=[], metavar="DIR", action="extend",
        help="folders of tools/ablate.py and tools/run_trials.py, whose tables are shown",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    return run_command(lambda: _write(options))


def _write(options: argparse.Namespace) -> int:
    text = render(options.out, options.runs, options.studies)
    write_text(options.out / "report.html", text)
    print(f"{options.out / 'report.html'}: {len(text.encode()) / 1e6:.2f} MB")
    return 0


def render(out: Path, runs: Sequence[Path] = (), studies: Sequence[Path] = ()) -> str:
    """Return the page of a run.

    Args:
        out: Folder of a pipeline's run.
        runs: Folders of pretraining runs to compare with.
        studies: Folders of studies and trials to show.

    Raises:
        UserError: If a folder does not hold what it should.
    """
    if not (out / "stages.json").is_file():
        raise UserError(f"{out} holds no run: {out / 'stages.json'} is missing")
    run = data.Run.load(out)
    values = context(run) | compared(run, runs, studies)
    title = f"{values['name']}: pretrained against random initialisation"
    header, main_part = (
        page.fragment(name, values) for name in ("report_header.html.j2", "report.html.j2")
    )
    footer = "Written by the pipeline's report stage. This page needs no other file and no network."
    return page.render(page.Page(title, header, main_part, footer))


def compared(run: data.Run, runs: Sequence[Path], studies: Sequence[Path]) -> dict[str, Any]:
    """Return the sections that reach beyond the run's folder, and what was skipped in all."""
    own = own_pretraining(run)
    others = runs_section.read_all([*own, *runs]) if runs else []
    shown = [studies_section.read(folder, number) for number, folder in enumerate(studies, 1)]
    items = [*skipped.of_pipeline(run), *skipped.of_runs(others, told=own)]
    items += [item for study in shown for item in study.skipped]
    return runs_section.context(others) | {"studies": shown} | skipped.context(items)


def own_pretraining(run: data.Run) -> list[Path]:
    """Return the folder of the run's own pretraining, where it began."""
    folder = run.out / "pretrain"
    return [folder] if runs_module.is_run(folder) else []


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
        "metrics": results.METRICS,
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
        **features_section.context(run),
        "card": run.json("convert/backbone.json") if run.finished("convert") else {},
        "dataset": run.json("data/dataset.json"),
        "stages": stages,
        "total_seconds": sum(row["seconds"] or 0.0 for row in stages),
        "peak_memory": max((row["memory"] or 0 for row in stages), default=0),
        "bad_samples": data.bad_samples(run),
        **detection_section.context(run),
        **other_sets_section.context(run),
    }


def pair_sections(run: data.Run) -> list[dict[str, Any]]:
    """Return charts and tables of each pair of arms that ran."""
    sections = []
    for pair, (treated, control) in results.PAIRS.items():
        if not (run.results["detection"][treated] or run.results["detection"][control]):
            continue
        title = results.PAIR_TITLES[pair]
        classes = data.per_class_rows(run.results["detection"], pair, "per_class")
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
    lines = []
    for tone, (curves, mean) in data.ap_curves_of_pair(run, pair, "AP50").items():
        if len(curves) > 1:
            lines += [Series(f"{tone}, seed {s}", c, tone, thin=True) for s, c in curves.items()]
        lines.append(Series(tone, mean, tone))
    title = f"AP50 over training iterations, {results.PAIR_TITLES[pair].lower()}"
    return charts.line_chart(title, lines, "iterations", from_zero=True)


def seed_chart(run: data.Run, pair: str) -> charts.Markup | None:
    """Return AP50 of every seed in both arms."""
    rows = data.seed_rows(run.results["detection"], pair, "AP50")
    title = f"AP50 of every seed, {results.PAIR_TITLES[pair].lower()}"
    return charts.slope_chart(
        title, [(f"seed {seed}", control, treated) for seed, control, treated in rows]
    )


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


if __name__ == "__main__":
    sys.exit(main())
