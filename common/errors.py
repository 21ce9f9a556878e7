"""What every command line shares: errors reported without a traceback, exit statuses, options.

`--check [all|settings] [--json]`: a program checks its whole input and says what it would do.
`--slurm-option KEY=VALUE`: further lines of sbatch.
What nobody knows (a key, a file, an option, a value of one) is answered with the nearest name.
"""

import argparse
import contextlib
import difflib
import errno
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from common.lazy import torch

MAX_MESSAGE = 8000  # characters
MAX_LISTED = 20  # names in a message
# The only word of a call that checks many: standard input holds a JSON list of argument lists.
EACH = "--check-each"


class UserError(ValueError):
    """A user's mistake: the message names the value, the place and the remedy (exit status 2)."""


class RunFailed(RuntimeError):
    """Work went wrong for a known reason: the message says how to go on (exit status 1)."""


class StoppedBySignal(RuntimeError):
    """A signal ended the work; what was finished is kept (exit status 128 + the signal's number).

    Attributes:
        number: Of the signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def require(condition: bool, message: str) -> None:
    """Refuse what a user wrote.

    Raises:
        UserError: With the message, unless the condition holds.
    """
    if not condition:
        raise UserError(message)


def at_least(settings: object, section: str, **lowest: float) -> None:
    """Refuse settings below their bound; None is not checked. ``section`` is for the message."""
    for name, bound in lowest.items():
        x = getattr(settings, name)
        require(x is None or x >= bound, f"{section}.{name} must be >= {bound}, got {x}")


def positive(settings: object, section: str, *names: str) -> None:
    """Refuse settings that are 0 or below; None is not checked."""
    for name in names:
        value = getattr(settings, name)
        require(value is None or value > 0, f"{section}.{name} must be > 0, got {value}")


def within_0_and_1(settings: object, section: str, *names: str) -> None:
    """Refuse settings outside of 0..1; None is not checked."""
    for name in names:
        x = getattr(settings, name)
        require(x is None or 0 <= x <= 1, f"{section}.{name} must be in [0, 1], got {x}")


def printable(text: str) -> str:
    """A file name, or text that holds one; what is no UTF-8 becomes hexadecimal codes."""
    try:
        return os.fsencode(text).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a pair of UTF-16, which stands for no byte
        return text.encode("utf-8", "backslashreplace").decode()


def unknown(
    what: str, name: str, known: Collection[str], prefix: str = "", more: Collection[str] = ()
) -> str:
    """What to say of a name that nobody knows: the nearest one, of ``more`` as well; else some."""
    near = difflib.get_close_matches(name, sorted({*known, *more}), n=1)
    if near:
        return f"unknown {what}; did you mean {prefix}{near[0]}?"
    listed = ", ".join(sorted(known)[:MAX_LISTED]) + ", .." * (len(known) > MAX_LISTED)
    return f"unknown {what}; known are {listed}"


def no_such_file(path: str | Path, remedy: str, kind: str = "file or folder") -> str:
    """What to say of a file or folder that is not there: the nearest name beside it, or a remedy.

    Args:
        path: As the user wrote it.
        remedy: What to do where no name is near.
        kind: What it should be.
    """
    path, there = Path(path), []
    with contextlib.suppress(OSError, ValueError):
        there = os.listdir(path.parent)
    if path.name in there:
        return f"{path}: a link to a {kind} that is not there; mend or remove it"
    near = difflib.get_close_matches(path.name, there, n=1)
    remedy = f"did you mean {path.parent / near[0]}?" if near else remedy
    return f"{path}: no such {kind}; {remedy}"


_REMEDIES = {
    errno.EEXIST: "a file is in the way; choose another name",
    errno.ENOTDIR: "a file is where a folder is expected; choose another name",
    errno.EISDIR: "a folder is where a file is expected; choose another name",
    errno.ELOOP: "a link is in the way; remove it",
    errno.ENAMETOOLONG: "this name is too long; choose another",
    errno.EACCES: "not allowed; change its rights or its folder's, or choose another place",
    errno.EPERM: "not allowed; change its owner or rights, or choose another place",
    errno.EROFS: "is on a disk that is mounted read-only; choose another place",
}


def describe_os_error(error: OSError) -> str:
    """What the operating system refused, at which file, and what to do about it."""
    if error.errno is None:  # raised by our own code, with a whole sentence
        return str(error)
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in _REMEDIES and error.filename:
        return f"{os.fsdecode(error.filename)}: {_REMEDIES[error.errno]}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"disk full{where}: free some space and run the same command again"
    if error.errno == errno.ENOENT and error.filename:
        return no_such_file(os.fsdecode(error.filename), "check the path")
    return f"{error.strerror or error}{where}"


# Parts of the messages of PyTorch on a CPU, and of a loader whose worker the system has killed.
_NO_MEMORY = (
    "DefaultCPUAllocator", "is killed by signal: Killed", "is killed by signal: Bus error",
)  # fmt: skip
_WORKER_DIED = "is killed by signal"


@contextlib.contextmanager
def memory_remedy(remedy: str) -> Iterator[None]:
    """A context in which memory that has run out is reported with what to change.

    It knows the errors of CUDA, of PyTorch on a CPU, of Python, and of a loader's worker that was
    killed.

    Args:
        remedy: The settings to lower.

    Raises:
        RunFailed: Instead of these errors; any other goes through.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        details = " ".join(str(error).split())
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
            text in details for text in _NO_MEMORY
        )
        if not is_memory and _WORKER_DIED in details:
            raise RunFailed(
                f"a process that reads pictures died ({details[:200]}); go on with --resume; if it "
                "dies again, without such processes (num_workers=0) the error shows"
            ) from error
        if not is_memory:
            raise
        raise RunFailed(f"out of memory ({details[:200] or 'no details'}); {remedy}") from error


def run_command(
    work: Callable[[], int | None],
    *,
    failures: tuple[type[Exception], ...] = (),
    when_interrupted: str = "stopped; the same command goes on",
) -> int:
    """Do a command's work and report the errors that need no traceback on stderr.

    Args:
        work: Returns the exit status of a command that came to its end; None: 0.
        failures: Further exceptions that say "it went wrong", such as a library's own.
        when_interrupted: What to say after Ctrl-C.
    Returns:
        The exit status: that of `work`; 1 if it went wrong; 2 for wrong arguments or input; 130
        after Ctrl-C; 128 + the number of another signal.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        return work() or 0
    except UserError as error:
        status, message = 2, f"error: {error}"
    except StoppedBySignal as error:
        status, message = 128 + error.number, str(error)
    except KeyboardInterrupt:
        status, message = 130, when_interrupted
    except OSError as error:
        status = 2 if error.errno in _REMEDIES else 1
        message = f"error: {describe_os_error(error)}"
    except (RunFailed, *failures) as error:
        status, message = 1, f"error: {error}"
    message = printable(message)
    if len(message) > MAX_MESSAGE:  # it quotes a file that holds one long word
        message = f"{message[:MAX_MESSAGE]} .. ({len(message):,} characters)"
    print(message, file=sys.stderr, flush=True)
    return status


class _Parser(argparse.ArgumentParser):
    """Proposes the nearest name; an option with an optional value takes no word that is none."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Read `--check KEY=VALUE` as `--check=all KEY=VALUE`."""
        words = list(sys.argv[1:] if args is None else args)
        for index, (word, following) in enumerate(itertools.pairwise(words)):
            action = self._option_string_actions.get(word)
            if word == "--":
                break
            if action is not None and action.nargs == "?" and not _may_be_value(action, following):
                words[index] = f"{word}={action.const}"
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Report it, with the nearest known options."""
        _, is_unknown, listed = message.partition("unrecognized arguments: ")
        known = list(self._option_string_actions)
        for action in self._actions:  # the options of commands within this one
            if isinstance(action, argparse._SubParsersAction):
                known += [
                    name for one in action.choices.values() for name in one._option_string_actions
                ]
        options = [word.partition("=")[0] for word in listed.split() if word.startswith("--")]
        near = [name for word in options if is_unknown
                for name in difflib.get_close_matches(word, sorted(set(known)), n=1)]  # fmt: skip
        super().error(message + f"; did you mean {', '.join(near)}?" * bool(near))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = action.choices
        if choices is not None and value not in choices:
            text = unknown(f"value {value!r}", str(value), [str(choice) for choice in choices])
            raise argparse.ArgumentError(action, text)


def _may_be_value(action: argparse.Action, word: str) -> bool:
    """Whether a word after an option is its value, or meant to be."""
    if action.choices is not None:
        is_misspelt = word.isalpha() and difflib.get_close_matches(word, map(str, action.choices))
        return word in action.choices or bool(is_misspelt)
    try:
        return word.startswith("-") or not callable(action.type) or action.type(word) is not None
    except (ValueError, argparse.ArgumentTypeError):
        return False


def command_parser(description: str | None, **more: Any) -> argparse.ArgumentParser:
    """A parser whose help keeps the line breaks of its texts.

    Args:
        description: A module's docstring; from its line "Examples:" on it stands below the options.
        more: As `argparse.ArgumentParser` takes it.
    """
    above, *below = re.split(r"^(?=Examples?:$)", description or "", maxsplit=1, flags=re.M)
    layout = argparse.RawDescriptionHelpFormatter
    return _Parser(description=above, epilog="".join(below), formatter_class=layout, **more)


def whole(least: int) -> Callable[[str], int]:
    """The type of options that take whole numbers not below a bound."""

    def whole_number(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{text}: give {least} or more")
        return number

    return whole_number


def add_check_options(parser: argparse.ArgumentParser) -> None:
    """Add both options; `check` is parsed to None, "all" or "settings"."""
    parser.add_argument(
        "--check", nargs="?", const="all", choices=("all", "settings"),
        help="check the input, say what would be done, and stop; settings: not the data, which "
        "may not be there yet",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="with --check: say it as JSON")


def json_file(text: str) -> Path:
    """The type of options that name a file or stand alone: the next word is another's, or this."""
    if text != "-" and not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text!r}: give a file name that ends in .json")
    return Path(text)


def duration(seconds: float) -> str:
    """A time for people: 3.4 s, 35 s, 2 min 5 s, 1 h 2 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min " * bool(minutes) + f"{rest} s"


def print_check(facts: Mapping[str, Any], *, as_json: bool) -> bool:
    """Print what a check found out, as one line of JSON or a line for each fact; False: no work."""
    if as_json:
        print(json.dumps(facts))
    else:
        print("\n".join(f"{key}: {_shown(key, value)}" for key, value in facts.items()))
    return False


def _shown(key: str, value: Any) -> str:
    """A fact, rounded."""
    if isinstance(value, list):
        return ", ".join(_shown("", item) for item in value)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if key == "seconds":
        return duration(value)
    if key.endswith("bytes"):
        return f"{value / 1e6:,.1f} MB"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def run_or_check_each(main: Callable[[list[str] | None], int]) -> int:
    """Run a program, or its checks for each argument list; returns the exit status.

    The checks print one JSON line each: what `main` printed, or {"error": its message}. One process
    does what many would do, whose imports take longer than the checks.
    """
    if sys.argv[1:] != [EACH]:
        return main(None)
    for words in json.load(sys.stdin):
        out, err = io.StringIO(), io.StringIO()
        status: Any = 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main(words)
        except SystemExit as stop:  # argparse
            status = stop.code
        # The error, with the lines that belong to it; argparse writes its usage before.
        message = " ".join(err.getvalue().partition("error: ")[2].split()) or "no message"
        answer = out.getvalue().splitlines()[-1:] or ["{}"]
        print(json.dumps({"error": message}) if status else answer[0], flush=True)
    return 0


def add_slurm_option(parser: argparse._ActionsContainer) -> None:
    """Add ``--slurm-option KEY=VALUE``, which may be repeated; parsed to a list of pairs."""
    parser.add_argument(
        "--slurm-option", type=_pair, action="append", default=[], metavar="KEY=VALUE",
        help="further line for sbatch, such as account=vision; may be repeated",
    )  # fmt: skip


def _pair(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    if not (key and value and text.isprintable()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form KEY=VALUE without line breaks, e.g. account=vision"
        )
    return key, value
