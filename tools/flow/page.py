"""The shell of every page: style, themes, contents, scripts; a page needs nothing but itself.

A browser is told to refuse any request and any script but the files `*.js` of this folder, which
are known by their hashes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tools.flow.progress import clock
from tools.flow.report_data import is_number

DASH = "\u2013"
HERE = Path(__file__).resolve().parent
LIGHT = {
    "page": "#f4f5f7", "card": "#ffffff", "ink": "#171b21", "muted": "#56606c", "rule": "#dfe3e8",
    "border": "#7a8592", "soft": "#eef3fa", "random": "#6f7a87", "pretrained": "#1667c7",
    "good": "#137a43", "bad": "#b3261e", "open": "#8a5a00",
    "run-0": "#1667c7", "run-1": "#c2410c", "run-2": "#137a43", "run-3": "#8b3fb8",
    "run-4": "#8f6a00", "run-5": "#0e7490", "run-6": "#be185d", "run-7": "#5b6470",
}  # fmt: skip
DARK = {
    "page": "#0f1318", "card": "#181d24", "ink": "#e8ebef", "muted": "#a2acb8", "rule": "#2c343e",
    "border": "#7d8894", "soft": "#1d2733", "random": "#98a3b0", "pretrained": "#62aaff",
    "good": "#55c98a", "bad": "#ff8a80", "open": "#e5b454",
    "run-0": "#62aaff", "run-1": "#ff9a5c", "run-2": "#55c98a", "run-3": "#cf9bf5",
    "run-4": "#e0bc4a", "run-5": "#4fc9dd", "run-6": "#ff86b8", "run-7": "#b4bec9",
}  # fmt: skip
NUM_COLOURS, NUM_DASHES = 8, 4


@dataclass(frozen=True)
class Page:
    """What stands on a page.

    Attributes:
        title: For the browser's tab.
        header: Begins with what comes before the `h1`, or with it.
        main: Sections, each with an `id` and a heading `h2`; the contents are made of these.
        footer: One sentence.
    """

    title: str
    header: Markup
    main: Markup
    footer: str = "This page needs no other file and no network."


def render(page: Page) -> str:
    """The whole page."""
    entries = contents(page.main)
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            contents=entries if len(entries) > 1 else [],
            policy=policy(),
            style=Markup(palette() + asset("report.css")),
            theme_script=Markup(asset("theme.js")),
            script=Markup(asset("report.js")),
        )
    )


def fragment(template: str, values: Mapping[str, Any]) -> Markup:
    """A template of this folder, as a part of a page."""
    return Markup(environment().get_template(template).render(values))


@functools.cache
def environment() -> jinja2.Environment:
    """Where templates come from, and their filters."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "number": number,
        "signed": signed,
        "clock": lambda value: clock(value) if is_number(value) else DASH,
        "gib": lambda value: f"{value / 2**30:.2f} GiB" if is_number(value) else DASH,
        "scientific": lambda value: f"{value:.1e}" if is_number(value) else DASH,
    }
    return made


def policy() -> str:
    """What a browser may do: no request at all, no script but ours."""
    hashes = [hashlib.sha256(path.read_bytes()).digest() for path in sorted(HERE.glob("*.js"))]
    scripts = " ".join(f"'sha256-{base64.b64encode(found).decode()}'" for found in hashes)
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def palette() -> str:
    """The colours as CSS: the system's theme, unless one was chosen; light on paper."""
    light, dark = (
        "; ".join(f"--{name}: {colour}" for name, colour in colours.items())
        for colours in (LIGHT, DARK)
    )
    return (
        f":root {{ color-scheme: light; {light}; }}\n"
        "@media screen and (prefers-color-scheme: dark) {\n"
        f'  :root:not([data-theme="light"]) {{ color-scheme: dark; {dark}; }}\n}}\n'
        f'@media screen {{ :root[data-theme="dark"] {{ color-scheme: dark; {dark}; }} }}\n'
    )


def tone(index: int) -> str:
    """Classes of the line of one of several runs: 32 pairs of a colour and a dash pattern."""
    dash = (index + index // NUM_COLOURS) % NUM_DASHES
    return f"run run-{index % NUM_COLOURS} dash-{dash}"


def contents(main: str) -> list[tuple[str, str]]:
    """(id, heading) of every section that has both, in their order."""
    reader = _Contents()
    reader.feed(main)
    return reader.found


class _Contents(HTMLParser):
    """Takes the first `h2` of each section with an `id`, but for what is small in it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self._section: str | None = None
        self._words: list[str] | None = None
        self._is_small = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "section":
            self._section = dict(attrs).get("id")
        elif tag == "h2" and self._section is not None:
            self._words = []
        elif tag == "small":
            self._is_small = True

    def handle_data(self, data: str) -> None:
        if self._words is not None and not self._is_small:
            self._words.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "small":
            self._is_small = False
        if tag == "h2" and self._words is not None and self._section is not None:
            self.found.append((self._section, " ".join("".join(self._words).split())))
            self._section = self._words = None


def number(value: Any, digits: int = 1) -> str:
    """Return a number for a table; a dash where there is none."""
    return f"{value:.{digits}f}" if is_number(value) else DASH


def signed(value: Any, digits: int = 1) -> str:
    """Return a number with its sign (a true minus); a dash where there is none."""
    if not is_number(value):
        return DASH
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def asset(name: str) -> str:
    """A style sheet or script of this folder."""
    return (HERE / name).read_text(encoding="utf-8")
