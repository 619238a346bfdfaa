"""Epochs in MLflow while a fold still trains."""

import time
from pathlib import Path

from pipeline_steps.params import Params
from pipeline_steps.vision.engine import Epoch

# A fold that is done sooner is logged whole by `evaluate`: importing MLflow would take longer than training it.
LIVE_AFTER_S = 20.0
LOG_EVERY_S = 2.0


class LiveLog:
    """Called after each epoch; from the twentieth second on it sends what MLflow does not have yet."""

    def __init__(self, params: Params, model: str, fold: int, root: Path = Path()) -> None:
        self.params, self.model, self.fold, self.root = params, model, fold, root
        self.history: list[dict[str, float]] = []
        self.next = time.monotonic() + LIVE_AFTER_S
        self.away = False

    def __call__(self, epoch: Epoch) -> None:
        """Keeps the epoch, and sends all that are due."""
        self.history.append(vars(epoch))
        if self.away or time.monotonic() < self.next:
            return
        from pipeline_steps.tracking import Tracker, tolerant

        self.away = True  # until this call has gone through
        with tolerant():
            Tracker(self.params, self.root).epochs(self.model, self.fold, self.history)
            self.away = False
        self.next = time.monotonic() + LOG_EVERY_S
