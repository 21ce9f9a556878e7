"""Tables, verdicts and plots of studies and of detection trials, as parts of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.flow.errors import UserError
from tools.flow.files import read_json
from tools.studies import results, trial_tables, trials
from tools.studies.documents import Section, sections_html

_READERS = {results.FORMAT: results, trials.FORMAT: trial_tables}
_MAKERS = "tools/ablate.py or tools/run_trials.py"


@dataclass(frozen=True)
class Study:
    """A study or trials: `results` as in the file, `sections` as they are shown."""

    title: str
    results: dict[str, Any]
    sections: Sequence[Section]


def read(folder: Path) -> Study:
    """What a study's folder holds.

    Raises:
        UserError: If `results.json` is missing, damaged, or not that of a study or of trials.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: {folder} is no folder that {_MAKERS} has finished")
    found = read_json(path)
    kind = found.get("format") if isinstance(found, dict) else None
    reader = _READERS.get(str(kind))
    if reader is None or not isinstance(found, dict):
        known = " or ".join(_READERS)
        raise UserError(f"{path} has the format {kind}, not {known}, which {_MAKERS} writes")
    try:
        name = f"{reader.title(found)} ({folder.resolve().name})"
        return Study(name, found, reader.sections(found))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path} is damaged: {type(error).__name__} at {error}; write it anew by the command "
            "that made the study"
        ) from None


def context(studies: Sequence[Study]) -> dict[str, Any]:
    """What `studies_section.html.j2` shows."""
    return {
        "studies": [
            {
                "id": f"study-{number}",
                "title": study.title,
                "is_complete": study.results["is_complete"],
                "parts": sections_html(study.sections, f"study-{number}-part", is_nested=True),
            }
            for number, study in enumerate(studies, 1)
        ]
    }
