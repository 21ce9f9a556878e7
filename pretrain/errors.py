"""The one exception that command lines turn into a message without a traceback."""


class UserError(ValueError):
    """A user's mistake: the message names the value, the place and the remedy."""


def require(condition: bool, message: str) -> None:
    """Refuse what a user wrote.

    Raises:
        UserError: With the message, unless the condition holds.
    """
    if not condition:
        raise UserError(message)
