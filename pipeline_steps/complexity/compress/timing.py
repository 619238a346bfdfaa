"""How long packaged models take in ONNX Runtime, one beside the other."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

ROUNDS = 7  # in which the models take turns, so that a busy machine slows all of them
BATCHES = {1: 8, 32: 1}  # batch size to calls a round
N_THREADS = 1  # as a package is served: calls side by side are faster than one over all cores


@dataclass(frozen=True)
class Timing:
    """Milliseconds an image: of the quickest round, the median one and the slowest; a round is the median of its calls.

    The quickest round is the one that the rest of the machine disturbed least; the others say how much it did.
    """

    quickest_ms: float
    median_ms: float
    slowest_ms: float


def time_in_turns(packages: Mapping[str, Path], sizes: Mapping[str, int]) -> dict[str, dict[int, Timing]]:
    """Times the network of each package, from pixels to probabilities, without decoding and resizing.

    Args:
        packages: folders by name.
        sizes: of the input, pixels a side, by the same names.

    Returns:
        By name and batch size.
    """
    calls = {name: _Call(folder / "network.onnx", sizes[name]) for name, folder in packages.items()}
    rounds: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in BATCHES} for name in calls}
    for call in calls.values():
        for batch in BATCHES:
            call.ms_an_image(batch, 1)  # memory is set aside at the first call
    for _ in range(ROUNDS):
        for name, call in calls.items():
            for batch, n_calls in BATCHES.items():
                rounds[name][batch].append(call.ms_an_image(batch, n_calls))
    return {
        name: {batch: Timing(min(times), median(times), max(times)) for batch, times in by_batch.items()}
        for name, by_batch in rounds.items()
    }


class _Call:
    """A graph that can be called with batches of noise."""

    def __init__(self, graph: Path, size: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = N_THREADS
        self.session: Any = onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])
        noise = np.random.default_rng(0)
        self.pixels = {batch: noise.integers(0, 256, (batch, 3, size, size), np.uint8) for batch in BATCHES}

    def ms_an_image(self, batch: int, n_calls: int) -> float:
        times = []
        for _ in range(n_calls):
            started = perf_counter()
            self.session.run(None, {"pixels": self.pixels[batch]})
            times.append(perf_counter() - started)
        return 1000 * median(times) / batch
