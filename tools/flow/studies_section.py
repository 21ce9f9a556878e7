"""Tables, verdicts and plots of studies and of detection trials, as parts of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2.exceptions import UndefinedError
from markupsafe import Markup

from common.errors import UserError
from common.files import read_json_or_none
from tools.flow.skipped import Item, of_study
from tools.studies import results, trial_tables, trials
from tools.studies.documents import Section, sections_html

_READERS = {results.FORMAT: results, trials.FORMAT: trial_tables}
_MAKERS = "tools/ablate.py or tools/run_trials.py"


@dataclass(frozen=True)
class Study:
    """A study or trials.

    Attributes:
        id: Of its section.
        title: Its name, with that of its folder.
        sections: What its own tables.html shows.
        parts: The same, as a part of the report.
        skipped: What failed, was left out or has not run.
    """

    id: str
    title: str
    sections: Sequence[Section]
    parts: Markup
    skipped: Sequence[Item]


def read(folder: Path, number: int = 1) -> Study:
    """What a study's folder holds, as the study with this number of a page.

    Raises:
        UserError: If `results.json` is missing, damaged, or not that of a study or of trials.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: {folder} is no folder that {_MAKERS} has finished")
    found = read_json_or_none(path)
    kind = found.get("format") if isinstance(found, dict) else None
    reader = _READERS.get(str(kind))
    if reader is None or not isinstance(found, dict):
        known = " or ".join(_READERS)
        raise UserError(f"{path} has the format {kind}, not {known}, which {_MAKERS} writes")
    try:
        name = f"{reader.title(found)} ({folder.resolve().name})"
        sections = reader.sections(found)
        parts = sections_html(sections, f"study-{number}-part", is_nested=True)
        return Study(f"study-{number}", name, sections, parts, of_study(found, name))
    except (LookupError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); write it anew by the command "
            "that made the study"
        ) from None
