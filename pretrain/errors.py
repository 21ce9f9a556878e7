"""The one exception that command lines turn into a message without a traceback."""


class UserError(ValueError):
    """A user's mistake: the message names the value, the place and the remedy."""
