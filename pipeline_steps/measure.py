"""What registered models show in fresh processes: their answers and what these cost."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from pipeline_steps import isolated, package
from pipeline_steps.bootstrap import Labels, labels_of
from pipeline_steps.gate import Broken, Measured
from pipeline_steps.progress import say

ROUNDS, IMAGES_A_ROUND = 5, 8  # of the timing; the models take turns, so that a busy machine slows both
ANSWERED_AT_ONCE = 256


def measure(
    models: Sequence[tuple[str, Path]], images: Sequence[Path], targets: Sequence[str]
) -> list[Measured | Broken]:
    """Asks MLflow models for all images, each in a fresh process, and then times them in turns.

    Args:
        models: version and folder of each.
        images: files, at least one.
        targets: that all of them answer.
    """
    broken: dict[str, Broken] = {}
    answers: dict[str, dict[str, list[Labels]]] = {}
    times: dict[str, list[float]] = {version: [] for version, _ in models}
    memory: dict[str, int] = {}
    with ExitStack() as processes:
        loaded: dict[str, isolated.Isolated] = {}
        for version, folder in models:
            try:
                say(f"register: version {version} answers {len(images):,} images in a process of its own")
                loaded[version] = processes.enter_context(isolated.start(isolated.requirements_of(folder)))
                loaded[version].load(folder)
                answers[version] = _answers(loaded[version], images, targets)
            except isolated.BrokenError as error:
                broken[version] = Broken(version, str(error))
        for _ in range(ROUNDS):
            for version in answers.keys() - broken.keys():
                try:
                    times[version].append(median(loaded[version].seconds(images[:IMAGES_A_ROUND])))
                    memory[version] = loaded[version].peak_memory_bytes()
                except isolated.BrokenError as error:
                    broken[version] = Broken(version, str(error))
    return [
        broken.get(version)
        # The quickest round is the one that the rest of the machine disturbed least.
        or Measured(version, answers[version], 1000 * min(times[version]), memory[version], package.n_bytes(folder))
        for version, folder in models
    ]


def _answers(model: isolated.Isolated, images: Sequence[Path], targets: Sequence[str]) -> dict[str, list[Labels]]:
    rows: list[dict[str, Any]] = []
    for start in range(0, len(images), ANSWERED_AT_ONCE):
        rows += model.answers(images[start : start + ANSWERED_AT_ONCE])
    if all(row["error"] for row in rows):
        raise isolated.BrokenError(f"it answered none of {len(rows):,} real images ({rows[0]['error']})")
    return {target: [labels_of(row[target]) for row in rows] for target in targets}
