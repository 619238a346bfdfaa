"""The one kind of error that a user sees without a traceback."""


class PleatError(Exception):
    """Bad input or a state the user can mend.

    The message is one clear sentence or two: what was wrong, where, what was expected, what to do.
    """
