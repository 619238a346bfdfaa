"""Packages on the same holdout, as they are served: images in, scores out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline_steps import metrics
from pipeline_steps.bootstrap import Answers, Estimate, Holdout, labels_of, paired_bootstrap
from pipeline_steps.complexity.compress.refitted import Refitted
from pipeline_steps.complexity.compress.threads import threads_restored
from pipeline_steps.model_card import CONFIDENCE, Held, labels_answered
from pipeline_steps.refit import numbers
from pipeline_steps.serving.classifier import Classifier


@dataclass(frozen=True)
class Scored:
    """What a package answers about the n samples of the holdout.

    Attributes:
        held: of each target.
        scores: the headline scores, means over the targets; `targets`: those of each target. Undefined ones are None.
    """

    held: Sequence[Held]
    scores: dict[str, float | None]
    targets: dict[str, dict[str, float | None]]


def score(refitted: Refitted, package: Path) -> Scored:
    """Answers every image of the holdout with the code that serves a package, and scores the answers.

    Without a holdout there are no scores, and nothing is answered.
    """
    rows = refitted.samples[refitted.samples["side"] == "holdout"]
    thresholds = refitted.travels.get("thresholds", {})
    with threads_restored():  # a classifier takes one
        answered = list(Classifier(package).probabilities(refitted.encoded(rows))) if len(rows) else []
    for answer in answered:
        if isinstance(answer, Exception):
            raise answer  # the pipeline has decoded these images before
    held = []
    for target in refitted.targets:
        parts = [answer[target.name] for answer in answered if not isinstance(answer, Exception)]
        probability = np.stack(parts) if parts else np.empty((0, len(target.classes)), dtype=np.float32)
        chosen = np.array(thresholds[target.name]) if target.multilabel else None
        held.append(Held(target, probability, metrics.answered(probability, chosen), chosen))
    if not len(rows):
        return Scored(held, {}, {})
    scores = [metrics.headlines(one.target.codes(rows), one.probability, one.predicted) for one in held]
    of_targets = {one.target.name: numbers(own) for one, own in zip(held, scores, strict=True)}
    return Scored(held, numbers(metrics.mean_of_targets(scores)), of_targets)


def change(refitted: Refitted, scored: Scored, base: Scored) -> Estimate:
    """How far weighted F1 lies above that of `base` on the same rows, with the 95% interval of a paired bootstrap."""
    rows = refitted.samples[refitted.samples["side"] == "holdout"]
    actual = {target.name: list(map(labels_of, target.labels(rows))) for target in refitted.targets}
    holdout = Holdout(actual, rows["group"].tolist())
    return paired_bootstrap(holdout, _answers(scored), _answers(base), CONFIDENCE).f1_weighted.mean


def _answers(scored: Scored) -> Answers:
    return {one.target.name: labels_answered(one) for one in scored.held}
