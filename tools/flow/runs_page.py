"""One page that compares runs: figures, config keys that differ, curves; it needs only itself."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from tools.flow import page, runs_section, skipped
from tools.flow.runs import RunInfo


def render(found: Sequence[RunInfo]) -> str:
    """Return the page."""
    values = runs_section.context(found) | skipped.context(skipped.of_runs(found))
    main = page.fragment("runs_section.html.j2", values)
    main += page.fragment("skipped_section.html.j2", values)
    header = Markup("<h1>Runs compared</h1>")
    return page.render(page.Page("Runs compared", header, main))
