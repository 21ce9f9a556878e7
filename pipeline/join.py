"""Seeds of several runs of one experiment, judged together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError, require
from common.files import read_record
from pipeline.config import FROZEN
from pipeline.results import make_table

_FORM = {"name": str, "tables": list, "commits": list, "failures": list, "rule": str}
_ABOUT = ("format", "name", "rule", "question", "seeds_of")
_DEFINITION = ("name", "title", "claim", "left_out")


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
    read = {path: read_record(path, _FORM, remedy=remedy) for path in paths}
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
