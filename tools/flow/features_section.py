"""Features before and after pretraining: two maps side by side, neighbours of the same queries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from tools.flow import gallery, page
from tools.flow import report_data as data

FORMAT = "fa-feature-map-1"
STATES = {"before": "Before pretraining", "after": "After pretraining"}
SIDE, MARGIN = 480, 16
MAX_CLASSES = 16  # with a mark of their own; the points of others are small grey dots
NUM_COLOURS = 8
# Okabe and Ito's palette for colour-blind readers, darker and lighter where the card needs it.
LIGHT = ("#0072b2", "#c04f00", "#007f5f", "#b2568c", "#2385b8", "#9a6700", "#6b6a00", "#3a3f45")
DARK = ("#4f9fe0", "#ff8a4d", "#2fc99a", "#e29cc7", "#8ad4f7", "#f0b429", "#f0e442", "#d5d9de")
# Paths from the middle of a mark; the eight differ in outline, not in colour alone.
SHAPES = (
    "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "m-3.6-3.6h7.2v7.2h-7.2z",
    "m0-4.8l4.6 8h-9.2z",
    "m0-5l4.6 5-4.6 5-4.6-5z",
    "m-1.5-4.6h3v3.1h3.1v3h-3.1v3.1h-3v-3.1h-3.1v-3h3.1z",
    "m0 4.8l4.6-8h-9.2z",
    "m-4.4-2.4l2-2 2.4 2.4 2.4-2.4 2 2-2.4 2.4 2.4 2.4-2 2-2.4-2.4-2.4 2.4-2-2 2.4-2.4z",
    "m-4.8-2.2h9.6v4.4h-9.6z",
)
OTHERS = "m-2 0a2 2 0 1 0 4 0a2 2 0 1 0-4 0z"
NO_MAP = (
    "Pretraining left no map: it had no labelled probe set of at least 8 pictures, or was told to "
    "make none (eval.num_map_points, eval.num_pictures)."
)
Word = dict[str, Any]


def context(run: data.Run) -> dict[str, Any]:
    """What the section shows, as `features`; empty parts where pretraining left nothing."""
    if not run.finished("pretrain"):
        return {"features": {}}
    script = Markup(page.asset("feature_map.js"))
    return {"features": {"map": feature_map(run), "gallery": neighbours(run), "script": script}}


def feature_map(run: data.Run) -> Word:
    """The maps with legend, figures and a summary in words; `missing` where there is none."""
    content = run.json("pretrain/feature_map.json")
    if not content:
        return {"missing": NO_MAP}
    if not _is_whole(content):
        return {"missing": "pretrain/feature_map.json is not of a form that this page knows."}
    labels, names = content["labels"], _names(content)
    marks = _marks(labels)
    states = {state: content.get(state) for state in STATES}
    thumbnails = content.get("thumbnails") or {}
    return {
        "panels": [
            {"state": state, "title": title, **_panel(states[state], title, labels, names, marks)}
            for state, title in STATES.items()
            if states[state] is not None
        ],
        "legend": _legend(labels, names, marks),
        "rows": _figures(content, states),
        "classes": _class_rows(labels, names, states),
        "words": _words(content, states),
        "method": content.get("method"),
        "library": content.get("library"),
        "seed": content.get("seed"),
        "notes": [note for note in (content.get("note"), content.get("missing")) if note],
        "num_points": len(labels),
        "sprite": gallery.embed(run.out / "pretrain" / str(thumbnails.get("file")), 2400),
        "columns": thumbnails.get("columns"),
        "style": Markup(_style()),
    }


def _is_whole(content: Mapping[str, Any]) -> bool:
    """Whether every point has a class, and a place where there are places."""
    labels = content.get("labels")
    if content.get("format") != FORMAT or not isinstance(labels, list) or not labels:
        return False
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        return False
    for state in STATES:
        drawn = content.get(state)
        for axis in ("x", "y"):
            values = (drawn or {}).get(axis)
            if values is not None and not (
                isinstance(values, list) and len(values) == len(labels)
                and all(map(data.is_number, values))
            ):  # fmt: skip
                return False
    return content.get("after") is not None


def _names(content: Mapping[str, Any]) -> list[str]:
    """What each class is called."""
    names = content.get("classes") or []
    most = max(content["labels"]) + 1
    return [str(names[i]) if i < len(names) else str(i) for i in range(most)]


def _marks(labels: Sequence[int]) -> dict[int, int]:
    """Which classes have a mark of their own: those with most points, numbered by class."""
    counts = {label: labels.count(label) for label in sorted(set(labels))}
    chosen = sorted(sorted(counts, key=lambda label: -counts[label])[:MAX_CLASSES])
    return {label: number for number, label in enumerate(chosen)}


def _tone(number: int | None) -> str:
    return "other" if number is None else f"tone-{number % NUM_COLOURS}"


def _shape(number: int | None) -> str:
    """Eight shapes, one further in each round of the colours: 64 pairs, all different."""
    if number is None:
        return OTHERS
    return SHAPES[(number + number // NUM_COLOURS) % len(SHAPES)]


def _panel(
    drawn: Mapping[str, Any], title: str, labels: Sequence[int], names: Sequence[str],
    marks: Mapping[int, int],
) -> Word:  # fmt: skip
    """One map as SVG, or why there is none."""
    if not drawn.get("x") or not drawn.get("y"):
        return {"svg": None, "note": drawn.get("note") or "There are no places."}
    places, height = _places(drawn["x"], drawn["y"])
    parts = []
    for number in [None, *range(len(marks))]:
        own = [i for i, label in enumerate(labels) if marks.get(label) == number]
        if not own:
            continue
        shape = _shape(number)
        paths = "".join(
            f'<path data-i="{i}" d="M{places[i][0]:.1f} {places[i][1]:.1f}{shape}">'
            f"<title>{escape(names[labels[i]])}</title></path>"
            for i in own
        )
        series = "others" if number is None else f"class-{number}"
        parts.append(f'<g class="{_tone(number)}" data-series="{series}">{paths}</g>')
    label = escape(f"{title}: {len(labels)} pictures as points. Figures stand in the table above.")
    svg = (
        f'<svg class="chart map" viewBox="0 0 {SIDE} {height:.0f}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )
    return {"svg": Markup(svg), "note": drawn.get("note")}


def _places(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[tuple[float, float]], float]:
    """Points in the drawing, y upwards, one scale for both axes; and the drawing's height."""
    spans = [(min(values), max(values)) for values in (xs, ys)]
    widest = max(high - low for low, high in spans) or 1.0
    scale = (SIDE - 2 * MARGIN) / widest
    middles = [(low + high) / 2 for low, high in spans]
    height = max((spans[1][1] - spans[1][0]) * scale + 2 * MARGIN, SIDE / 3)
    places = [
        (SIDE / 2 + (x - middles[0]) * scale, height / 2 - (y - middles[1]) * scale)
        for x, y in zip(xs, ys, strict=True)
    ]
    return places, height


def _legend(labels: Sequence[int], names: Sequence[str], marks: Mapping[int, int]) -> list[Word]:
    """A sample of each mark, its class and how many points there are."""
    rows: list[tuple[int | None, str, int]] = [
        (number, names[label], labels.count(label)) for label, number in marks.items()
    ]
    others = sorted(set(labels) - set(marks))
    if others:
        count = sum(labels.count(label) for label in others)
        rows.append((None, f"{len(others)} other classes", count))
    return [
        {
            "series": "others" if number is None else f"class-{number}",
            "name": name,
            "count": count,
            "sample": Markup(
                f'<svg class="sample map" viewBox="0 0 14 14" aria-hidden="true">'
                f'<g class="{_tone(number)}"><path d="M7 7{_shape(number)}"/></g></svg>'
            ),
        }
        for number, name, count in rows
    ]


def _figures(content: Mapping[str, Any], states: Mapping[str, Any]) -> list[Word]:
    """Rows of the table: what is measured, its values, its value by chance, in percent."""
    k = content.get("num_neighbours")
    chance = content.get("same_class_by_chance")
    rows = (
        ("same_class_features", f"Same class among the {k} nearest, features", chance),
        ("same_class_map", f"Same class among the {k} nearest, map", chance),
        ("neighbours_kept", f"Of the {k} nearest features, also nearest on the map",
         _kept_by_chance(k, len(content["labels"]))),
        ("trustworthiness", "Trustworthiness of the map", None),
    )  # fmt: skip
    return [
        {
            "title": title,
            "chance": None if by_chance is None else 100 * by_chance,
            **{state: _percent((states[state] or {}).get(key)) for state in STATES},
        }
        for key, title, by_chance in rows
    ]


def _kept_by_chance(k: Any, num_points: int) -> float | None:
    """How many of k neighbours another k of all the other points share with them."""
    return k / (num_points - 1) if data.is_number(k) and num_points > 1 else None


def _class_rows(
    labels: Sequence[int], names: Sequence[str], states: Mapping[str, Any]
) -> list[Word]:
    """For each class its points, and how many of their nearest have it too, in percent."""
    tables = {
        state: (states[state] or {}).get("same_class_by_label") or {} for state in STATES
    }  # fmt: skip
    return [
        {
            "name": names[label],
            "count": labels.count(label),
            **{state: _percent(table.get(str(label))) for state, table in tables.items()},
        }
        for label in sorted(set(labels))
    ]


def _words(content: Mapping[str, Any], states: Mapping[str, Any]) -> str:
    """The finding as a sentence."""
    k = content.get("num_neighbours")
    before, after = (
        _percent((states[state] or {}).get("same_class_features")) for state in STATES
    )  # fmt: skip
    if after is None:
        return ""
    told = f"from {before:.0f} % " if before is not None else ""
    chance = _percent(content.get("same_class_by_chance"))
    by_lot = "" if chance is None else f"; neighbours drawn by lot: {chance:.0f} %"
    return (
        f"Of the {k} pictures nearest to a picture among the features, the share of its class "
        f"{'went ' if told else 'is '}{told}{'to ' if told else ''}{after:.0f} %{by_lot}."
    )


def _percent(value: Any) -> float | None:
    return 100 * value if data.is_number(value) else None


def _style() -> str:
    """Colours of the classes, in the theme of the page."""

    def rules(root: str, colours: Sequence[str]) -> str:
        return "".join(f"{root}.map .tone-{i}{{fill:{c}}}" for i, c in enumerate(colours))

    chosen = rules(':root[data-theme="dark"] ', DARK)
    systems = rules(':root:not([data-theme="light"]) ', DARK)
    return (
        f"{rules('', LIGHT)}.map .other{{fill:var(--border)}}"
        f"@media screen{{{chosen}}}@media screen and (prefers-color-scheme:dark){{{systems}}}"
        f"{page.asset('features_section.css')}"
    )


def neighbours(run: data.Run) -> Word:
    """Neighbours of the same queries before and after, with how many have the query's class."""
    after = data.picture_rows(run, "neighbours")
    before = data.picture_rows(run, "neighbours_before")
    if not after:
        return {}
    keys = [[row["about"].get("query") for row in rows] for rows in (before, after)]
    note = None
    if not before:
        note = "The neighbours before pretraining are missing: the run began without pictures."
    elif keys[0] != keys[1] or None in keys[0]:
        before = []
        note = "The neighbours before pretraining are of other queries and are not shown."
    rows = [
        {
            "query": row["about"].get("query_label"),
            "states": [
                {"state": state, "title": STATES[state], **_counted(found[number])}
                for state, found in (("before", before), ("after", after))
                if found
            ],
        }
        for number, row in enumerate(after)
    ]
    return {"rows": rows, "note": note, "totals": _totals(rows), "bank": _bank(run)}


def _counted(row: Mapping[str, Any]) -> Word:
    """Tiles with their labels, and how many neighbours have the query's class."""
    about = row["about"]
    query, labels = about.get("query_label"), list(about.get("neighbour_labels") or [])
    tiles = row["tiles"]
    shown = [query, *labels][: len(tiles)]
    shown += [None] * (len(tiles) - len(shown))
    num_same = sum(label == query for label in labels) if query is not None else None
    return {
        "tiles": list(zip(tiles, shown, strict=True)),
        "num_same": num_same,
        "k": len(labels),
    }


def _totals(rows: Sequence[Mapping[str, Any]]) -> list[Word]:
    """How many of all shown neighbours have their query's class, for each state."""
    totals = []
    for number in range(len(rows[0]["states"])):
        own = [row["states"][number] for row in rows]
        if all(state["num_same"] is not None for state in own):
            found, of = (math.fsum(s[key] for s in own) for key in ("num_same", "k"))
            totals.append({"title": own[0]["title"], "num_same": int(found), "of": int(of)})
    return totals


def _bank(run: data.Run) -> int | None:
    """Pictures that neighbours were looked for among."""
    return run.json("pretrain/pictures/neighbours.json").get("num_bank")
