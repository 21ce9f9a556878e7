import io
import re

from pipeline.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen_of(text: str) -> list[str]:
    """What a terminal shows after `text`: the escapes used here, played on a list of lines."""
    lines, row = [""], 0
    for piece in re.findall(r"\x1b\[K|\x1b\[A|\r|\n|[^\x1b\r\n]+", text):
        if piece == "\x1b[A":
            row -= 1
        elif piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif piece == "\x1b[K":
            lines[row] = ""
        elif piece != "\r":
            lines[row] += piece
    return lines


def test_each_stage_has_a_live_line_with_its_name(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("pipeline.progress._LIVE_EVERY_SECONDS", 0.0)
    progress = Progress(4, stream)
    progress.start(1, "random/seed-0", "first run")
    progress.tick("random/seed-0", 65, "loading")
    assert screen_of(stream.getvalue())[-1] == "[1/4] random/seed-0  1:05  loading"
    progress.start(2, "pretrained/seed-0", "first run")
    progress.tick("pretrained/seed-0", 1, "")
    progress.tick("random/seed-0", 66, "[##..] 120/700")
    assert screen_of(stream.getvalue()) == [
        "[1/4] random/seed-0: first run",
        "[2/4] pretrained/seed-0: first run",
        "random/seed-0     | [##..] 120/700",
        "pretrained/seed-0 | 0:01",
    ]
    progress.finish("random/seed-0", "finished in 1:07")
    progress.finish("pretrained/seed-0", "finished in 0:03")
    assert [line for line in screen_of(stream.getvalue()) if line][2:] == [
        "[1/4] random/seed-0: finished in 1:07",
        "[2/4] pretrained/seed-0: finished in 0:03",
    ]


def test_plain_lines_carry_the_name(monkeypatch):
    monkeypatch.setattr("pipeline.progress._PLAIN_EVERY_SECONDS", 0.0)
    stream = io.StringIO()
    progress = Progress(2, stream)
    for number, name in enumerate(("random/seed-0", "pretrained/seed-0"), 1):
        progress.start(number, name, "first run")
    progress.tick("random/seed-0", 1, "[#.] 1/7")
    progress.tick("pretrained/seed-0", 1, "[.] 0/7")
    assert stream.getvalue().splitlines()[2:] == [
        "random/seed-0     | [#.] 1/7",
        "pretrained/seed-0 | [.] 0/7",
    ]
