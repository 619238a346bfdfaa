"""The one kind of error that a user sees without a traceback."""

FAILURE_FILE = "PLEAT_FAILURE_FILE"  # where `pleat` leaves its error for the Airflow task that started it


class PleatError(Exception):
    """Bad input or a state the user can mend.

    The message is one clear sentence or two: what was wrong, where, what was expected, what to do.

    Attributes:
        temporary: whether the same command may succeed later with nothing mended: a full disk, a network that is away.
    """

    def __init__(self, message: str, temporary: bool = False) -> None:
        super().__init__(message)
        self.temporary = temporary
