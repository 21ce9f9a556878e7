"""The errors that the pipeline's command line turns into a message without a traceback."""


class UserError(ValueError):
    """A user's mistake: the message names the value, the place and the remedy (exit status 2)."""


class StageError(RuntimeError):
    """A stage went wrong: the message names it, its log and how to go on (exit status 1)."""


class Stopped(RuntimeError):
    """The run was stopped by a signal; what was finished is kept."""

    def __init__(self, signum: int, message: str) -> None:
        """Keep the signal's number beside the message."""
        super().__init__(message)
        self.signum = signum
