"""Errors that a command line reports without a traceback, and the function that reports them."""

import errno
import os
import sys
from collections.abc import Callable


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
        value = getattr(settings, name)
        require(
            value is None or value >= bound, f"{section}.{name} must be >= {bound}, got {value}"
        )


def positive(settings: object, section: str, *names: str) -> None:
    """Refuse settings that are 0 or below; None is not checked."""
    for name in names:
        value = getattr(settings, name)
        require(value is None or value > 0, f"{section}.{name} must be > 0, got {value}")


def within_0_and_1(settings: object, section: str, *names: str) -> None:
    """Refuse settings outside of 0..1; None is not checked."""
    for name in names:
        value = getattr(settings, name)
        require(
            value is None or 0 <= value <= 1, f"{section}.{name} must be in [0, 1], got {value}"
        )


def printable(text: str) -> str:
    """A file name, or text that holds one; bytes that are no UTF-8 become hexadecimal codes."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def describe_os_error(error: OSError) -> str:
    """What the operating system refused, at which file, and what to do about a full disk."""
    if error.errno is None:  # raised by our own code, with a whole sentence
        return str(error)
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"disk full{where}: free some space and run the same command again"
    return f"{error.strerror or error}{where}"


def run_command(
    work: Callable[[], int],
    *,
    failures: tuple[type[Exception], ...] = (),
    when_interrupted: str = "stopped; the same command goes on",
) -> int:
    """Do a command's work and report the errors that need no traceback on stderr.

    Args:
        work: Returns the exit status of a command that came to its end.
        failures: Further exceptions that say "it went wrong", such as a library's own.
        when_interrupted: What to say after Ctrl-C.
    Returns:
        The exit status: that of `work`; 1 if it went wrong; 2 for wrong arguments or input; 130
        after Ctrl-C; 128 + the number of another signal.
    """
    try:
        return work()
    except UserError as error:
        status, message = 2, f"error: {error}"
    except StoppedBySignal as error:
        status, message = 128 + error.number, str(error)
    except KeyboardInterrupt:
        status, message = 130, when_interrupted
    except OSError as error:
        status, message = 1, f"error: {describe_os_error(error)}"
    except (RunFailed, *failures) as error:
        status, message = 1, f"error: {error}"
    print(printable(message), file=sys.stderr, flush=True)
    return status
