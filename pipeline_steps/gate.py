"""The promotion gate: from two models' answers on the holdout, and what they cost, to a decision with its reasons.

Shapes: `n` holdout rows in `g` groups, of the `c` classes that occur among them; `r` resamples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from pipeline_steps import metrics
from pipeline_steps.metrics import Floats, Ints
from pipeline_steps.params import Floors, Promotion

N_RESAMPLES = 2000
DRAWS_AT_ONCE = 4_000_000  # group numbers drawn before they are counted, which bounds the memory
DECIMALS = 12  # kept of a computed number: scores that are equal but for rounding are equal

Decision = Literal["promoted", "challenger", "rejected"]
Finding = tuple[Decision, str]  # what a model can become at best in the light of one sentence
SEVERITY: tuple[Decision, ...] = ("rejected", "challenger", "promoted")


@dataclass(frozen=True)
class Measured:
    """What a package showed in a fresh process: its answers on the holdout rows, and what they cost."""

    version: str  # such as "7" or "candidate"; for sentences
    predicted: list[str]  # a label for each holdout row, in the holdout's order; "" where the model gave no answer
    latency_ms: float  # median of single images
    memory_bytes: int  # peak resident
    size_bytes: int  # of the package's files


@dataclass(frozen=True)
class Broken:
    """A package that did not load, or did not answer a real image."""

    version: str
    reason: str  # one sentence without a full stop at its end


@dataclass(frozen=True)
class Holdout:
    """The rows that no model was trained on."""

    actual: list[str]
    group: list[str]  # rows of one group (near copies, one sender) are not independent


@dataclass(frozen=True)
class Verdict:
    """What becomes of a candidate, and why.

    `evidence` holds only what JSON knows, always under the same keys; what could not be measured is None:

    - n_rows, n_groups; settings (of `promotion` in params.yaml), seed, n_resamples;
    - candidate, champion: version and either broken (the reason) or latency_ms, memory_bytes, size_bytes, f1_weighted
      and f1_macro;
    - gain: value, low and high, in weighted F1;
    - classes: class to support, candidate_recall, champion_recall and recall_gain (value, low, high);
    - never_answered_by_champion: classes of the holdout that the champion names for no row, as those it never learned;
    - cost_ratios: latency, memory and size, the candidate's as a multiple of the champion's.
    """

    decision: Decision
    reasons: list[str]  # whole sentences, the deciding one first
    evidence: dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Gains:
    """How far the candidate is above the champion: in weighted F1, and in the recall of each class."""

    f1_weighted: Estimate
    recall: dict[str, Estimate]


@dataclass(frozen=True)
class _Scores:
    """Scores of one model over the classes that occur in the holdout."""

    f1_weighted: float
    f1_macro: float
    recall: dict[str, float]


def judge(
    settings: Promotion,
    holdout: Holdout,
    candidate: Measured | Broken,
    champion: Measured | Broken | None,
    seed: int = 0,
) -> Verdict:
    """Decides whether a trained candidate becomes champion, stays a challenger, or neither.

    Rejected is what is broken, cannot be judged, misses a floor, scores lower than the champion, or loses a class.
    A challenger is what is not shown to be better by more than `min_gain`, or costs too much. The rest is promoted.

    Args:
        settings: the block `promotion` of params.yaml; `mode` is the caller's.
        holdout: may be empty, which is a reason to reject.
        candidate: the package to judge.
        champion: None where no model was ever promoted; a broken one is compared with no more than an absent one.
        seed: of the bootstrap.

    Raises:
        ValueError: lists differ in length, a row has no label, or a cost is no positive number.
    """
    _check(holdout, candidate, champion)
    rows = bool(holdout.actual)
    scores = _scores(holdout, candidate.predicted) if rows and isinstance(candidate, Measured) else None
    champion_scores = _scores(holdout, champion.predicted) if rows and isinstance(champion, Measured) else None
    gains, ratios = None, None
    findings: list[Finding] = []

    if isinstance(candidate, Broken):
        findings.append(("rejected", f"{_named(candidate)} is broken: {candidate.reason}."))
    if not rows:
        reason = "The holdout is empty, so nothing can be judged: `split.holdout.fraction` in params.yaml is 0."
        findings.append(("rejected", reason))
    missed = _missed_floors(settings.floors, candidate, scores) if scores else []
    findings += missed
    if champion is None:
        findings.append(("promoted", "There is no champion to compare it with: this is the first model."))
    elif isinstance(champion, Broken):
        reason = f"Champion version {champion.version} is broken, so it could not be compared with: {champion.reason}."
        findings.append(("promoted", reason))
    elif isinstance(candidate, Measured):
        if scores and champion_scores:
            gains = paired_bootstrap(holdout, candidate.predicted, champion.predicted, settings.confidence, seed)
            findings.append(_compared(settings, candidate, champion, scores, champion_scores, gains.f1_weighted))
            findings += _collapsed(settings, holdout, scores, champion_scores, gains)
        ratios = _cost_ratios(candidate, champion)
        findings += _too_costly(settings, candidate, champion, ratios)
    if scores and not missed:
        findings.append(("promoted", _reached_floors(settings.floors, candidate, scores)))

    findings.sort(key=lambda finding: SEVERITY.index(finding[0]))  # stable: in the order above among equals
    evidence = {
        "n_rows": len(holdout.actual),
        "n_groups": len(set(holdout.group)),
        "settings": settings.model_dump(),
        "seed": seed,
        "n_resamples": N_RESAMPLES,
        "candidate": _model_evidence(candidate, scores),
        "champion": _model_evidence(champion, champion_scores) if champion else None,
        "gain": asdict(gains.f1_weighted) if gains else None,
        "classes": _class_evidence(holdout, scores, champion_scores, gains),
        "never_answered_by_champion": _never_answered(holdout, champion),
        "cost_ratios": ratios,
    }
    return Verdict(findings[0][0], [sentence for _, sentence in findings], evidence)


def paired_bootstrap(
    holdout: Holdout, candidate: Sequence[str], champion: Sequence[str], confidence: float, seed: int = 0
) -> Gains:
    """The candidate's gain over the champion on the same rows, with percentile intervals.

    The percentile interval is that of Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13. Both
    models are scored on every resample, so what makes a row hard for both drops out (Koehn 2004, "Statistical
    significance tests for machine translation evaluation"). Whole groups are drawn, as many as there are, because rows
    of one group are right or wrong together (the cluster bootstrap of Davison & Hinkley 1997, section 3.8).

    A resample without a class shows no gain in that class's recall, 0. So an interval excludes 0 only where the class
    occurs in enough groups: at 95% in four, since four groups are all left out of e^-4 = 1.8% of the resamples.
    A single group says nothing about the spread: its intervals are the whole range, -1 to 1. With few groups the
    intervals are too narrow.

    Args:
        holdout: n >= 1 rows. A row whose group is like no other stands for itself.
        candidate: n labels; one that does not occur in the holdout is a wrong answer, as is "".
        champion: n labels in the same order.
        confidence: between 0 and 1, such as 0.95.
        seed: the same seed and rows give the same intervals, in whatever order the rows stand.

    Raises:
        ValueError: there are no rows, lengths differ, or `confidence` is out of range.
    """
    _check_bootstrap(holdout, {"candidate": candidate, "champion": champion}, confidence)
    counts = _counts_by_group(holdout, candidate, champion)
    total, *by_class = _estimates(counts, _gains, confidence, seed, lowest=-1)
    return Gains(total, dict(zip(_classes(holdout), by_class, strict=True)))


def f1_weighted_interval(holdout: Holdout, predicted: Sequence[str], confidence: float, seed: int = 0) -> Estimate:
    """One model's weighted F1 with its percentile interval, over the same resamples as `paired_bootstrap`.

    Args:
        holdout: n >= 1 rows; a single group says nothing about the spread, its interval is 0 to 1.
        predicted: n labels; one that does not occur in the holdout is a wrong answer, as is "".
        confidence: between 0 and 1, such as 0.95.
        seed: the same seed and rows give the same interval, in whatever order the rows stand.

    Raises:
        ValueError: as `paired_bootstrap`.
    """
    _check_bootstrap(holdout, {"predicted": predicted}, confidence)
    counts = _counts_by_group(holdout, predicted)
    return _estimates(counts, lambda sums: _f1_weighted(*sums.swapaxes(0, 1))[:, None], confidence, seed, lowest=0)[0]


def _estimates(
    counts: Floats, scores: Callable[[Floats], Floats], confidence: float, seed: int, lowest: float
) -> list[Estimate]:
    """Each score with its interval.

    Args:
        counts: of each group, shape (g, m, c).
        scores: from counts of shape (r, m, c) to shape (r, number of scores).
        confidence: of the intervals.
        seed: of the resamples.
        lowest: the least that a score can be; the most is 1.
    """
    observed = scores(counts.sum(axis=0, keepdims=True))[0]
    if len(counts) == 1:
        low, high = np.full_like(observed, lowest), np.full_like(observed, 1)
    else:
        resampled = scores(_resample(counts, np.random.default_rng(seed)))
        low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    numbers = (np.stack([observed, low, high], axis=1).round(DECIMALS) + 0.0).tolist()  # + 0.0: no -0.000 in a sentence
    return [Estimate(*row) for row in numbers]


def _counts_by_group(holdout: Holdout, *models: Sequence[str]) -> Floats:
    """Counts from which every score follows, shape (g, 1 + 2 * number of models, c).

    The first are the rows of the class; then for each model its right answers and all its answers of the class.
    """
    classes, groups = _classes(holdout), sorted(set(holdout.group))
    actual, group = _numbered(holdout.actual, classes), _numbered(holdout.group, groups)
    # The last class: labels that do not occur in the holdout.
    counts = np.zeros((len(groups), 1 + 2 * len(models), len(classes) + 1))
    np.add.at(counts[:, 0], (group, actual), 1)
    for number, labels in enumerate(models):
        predicted = _numbered(labels, classes)
        np.add.at(counts[:, 1 + 2 * number], (group, actual), predicted == actual)
        np.add.at(counts[:, 2 + 2 * number], (group, predicted), 1)
    return counts[:, :, :-1]


def _resample(counts: Floats, rng: np.random.Generator) -> Floats:
    """Sums of `counts` over g groups drawn with replacement, shape (r, m, c), from (g, m, c)."""
    n_groups = len(counts)
    at_once = max(1, DRAWS_AT_ONCE // n_groups)
    parts = []
    for start in range(0, N_RESAMPLES, at_once):
        n = min(at_once, N_RESAMPLES - start)
        drawn = rng.integers(0, n_groups, (n, n_groups)) + n_groups * np.arange(n)[:, None]
        times = np.bincount(drawn.ravel(), minlength=n * n_groups).reshape(n, n_groups)
        parts.append(times.astype(np.float64) @ counts.reshape(n_groups, -1))
    return np.concatenate(parts).reshape(N_RESAMPLES, *counts.shape[1:])


def _gains(counts: Floats) -> Floats:
    """Gains in weighted F1 and in each class's recall, shape (r, 1 + c), from counts of shape (r, 5, c)."""
    support, right, answered, champion_right, champion_answered = counts.swapaxes(0, 1)
    f1_gain = _f1_weighted(support, right, answered) - _f1_weighted(support, champion_right, champion_answered)
    recall_gain = (right - champion_right) / np.maximum(support, 1)
    return np.column_stack([f1_gain, recall_gain])


def _f1_weighted(support: Floats, right: Floats, answered: Floats) -> Floats:
    """Weighted F1, shape (r,), from counts of shape (r, c): the F1 of a class is 2 right / (support + answered)."""
    f1 = 2 * right / np.maximum(support + answered, 1)
    weighted: Floats = (support * f1).sum(axis=1) / support.sum(axis=1)
    return weighted


def _scores(holdout: Holdout, predicted: Sequence[str]) -> _Scores:
    classes = _classes(holdout)
    by_class = metrics.class_scores(
        _numbered(holdout.actual, classes), _numbered(predicted, classes), n_classes=len(classes)
    )
    return _Scores(
        f1_weighted=round(float(np.average(by_class.f1, weights=by_class.support)), DECIMALS),
        f1_macro=round(float(by_class.f1.mean()), DECIMALS),
        recall=dict(zip(classes, by_class.recall.tolist(), strict=True)),
    )


def _classes(holdout: Holdout) -> list[str]:
    return sorted(set(holdout.actual))


def _numbered(labels: Sequence[str], order: list[str]) -> Ints:
    """The place of each label in `order`, or the number after the last for a label that is not there."""
    place = {label: number for number, label in enumerate(order)}
    return np.array([place.get(label, len(order)) for label in labels], dtype=np.int64)


def _cost_ratios(candidate: Measured, champion: Measured) -> dict[str, float]:
    return {
        "latency": round(candidate.latency_ms / champion.latency_ms, DECIMALS),
        "memory": round(candidate.memory_bytes / champion.memory_bytes, DECIMALS),
        "size": round(candidate.size_bytes / champion.size_bytes, DECIMALS),
    }


def _missed_floors(floors: Floors, candidate: Measured | Broken, scores: _Scores) -> list[Finding]:
    findings: list[Finding] = []
    for name, score, floor in (
        ("weighted F1", scores.f1_weighted, floors.f1_weighted),
        ("macro F1", scores.f1_macro, floors.f1_macro),
    ):
        if score < floor:
            found = f"{_named(candidate)} has a {name} of {_decimals(score, floor)} on the holdout"
            findings.append(("rejected", f"{found}, below the floor of {floor:.10g}."))
    return findings


def _reached_floors(floors: Floors, candidate: Measured | Broken, scores: _Scores) -> str:
    weighted = f"weighted F1 {_decimals(scores.f1_weighted, floors.f1_weighted)} (floor {floors.f1_weighted:.10g})"
    macro = f"macro F1 {_decimals(scores.f1_macro, floors.f1_macro)} (floor {floors.f1_macro:.10g})"
    return f"{_named(candidate)} reaches the floors on the holdout: {weighted} and {macro}."


def _compared(
    settings: Promotion,
    candidate: Measured,
    champion: Measured,
    scores: _Scores,
    champion_scores: _Scores,
    gain: Estimate,
) -> Finding:
    """What the gain in weighted F1 allows the candidate to become."""
    name, other, n_rows = _named(candidate), f"champion version {champion.version}", len(candidate.predicted)
    least, score = settings.min_gain, scores.f1_weighted
    if candidate.predicted == champion.predicted:
        reason = f"{name} gives the same answers as {other} on all {n_rows:,} holdout images, so it gains nothing"
        return "challenger", f"{reason}: weighted F1 {score:.3f} for both."
    low, high = _decimals(gain.low, least, "+"), _decimals(gain.high, 0, "+")
    interval = f"{100 * settings.confidence:.10g}% interval"
    numbers = (
        f"weighted F1 {score:.3f} against {champion_scores.f1_weighted:.3f} on {n_rows:,} holdout images, a gain of "
        f"{_decimals(gain.value, 0, '+')} with a {interval} of {low} to {high}"
    )
    if gain.high < 0:
        return "rejected", f"{name} scores lower than {other}: {numbers}, all of it below 0, so this is not noise."
    if gain.value < 0:
        return "rejected", f"{name} scores lower than {other}, though within noise: {numbers}."
    if gain.value == 0:
        reason = f"{name} has the same score as {other}, with other answers: weighted F1 {score:.3f} for both on"
        return "challenger", f"{reason} {n_rows:,} holdout images, a gain of 0 with a {interval} of {low} to {high}."
    if gain.low <= 0:
        return "challenger", f"{name} scores better than {other}, but within noise: {numbers}, which is not above 0."
    if gain.low <= least:
        reason = f"{name} scores better than {other}, but not surely by more than the required {least:.10g}"
        return "challenger", f"{reason}: {numbers}."
    return "promoted", f"{name} scores better than {other}: {numbers}, all of it above {least:.10g}."


def _collapsed(
    settings: Promotion, holdout: Holdout, scores: _Scores, champion_scores: _Scores, gains: Gains
) -> list[Finding]:
    """One finding for each class that the candidate loses, the worst first."""
    findings: list[Finding] = []
    interval = f"{100 * settings.confidence:.10g}% interval"
    for label, gain in sorted(gains.recall.items(), key=lambda item: item[1].value):
        if -gain.value > settings.max_class_drop and gain.high < 0:
            drop = f"{_decimals(-gain.high, 0)} to {_decimals(-gain.low, 0)}"
            reason = (
                f"Class '{label}' collapses: its recall falls from {champion_scores.recall[label]:.3f} to "
                f"{scores.recall[label]:.3f} on {holdout.actual.count(label):,} holdout images, by "
                f"{_decimals(-gain.value, settings.max_class_drop)} with a {interval} of {drop}, more than the limit "
                f"of {settings.max_class_drop:.10g}."
            )
            findings.append(("rejected", reason))
    return findings


def _too_costly(
    settings: Promotion, candidate: Measured, champion: Measured, ratios: dict[str, float]
) -> list[Finding]:
    name, limits = _named(candidate), settings.max_cost
    costs = (
        (ratios["latency"], limits.latency, "takes", f"{_digits(champion.latency_ms)} ms an image"),
        (ratios["memory"], limits.memory, "needs", f"{_digits(champion.memory_bytes / 1e6)} MB of memory"),
        (ratios["size"], limits.size, "fills", f"{_digits(champion.size_bytes / 1e6)} MB on disk"),
    )
    findings: list[Finding] = []
    for ratio, limit, verb, cost in costs:
        if ratio > limit:
            times = f"{_decimals(ratio, limit, least=1)} times the champion's {cost}"
            findings.append(("challenger", f"{name} {verb} {times}, more than the limit of {limit:.10g}."))
    return findings


def _model_evidence(model: Measured | Broken, scores: _Scores | None) -> dict[str, Any]:
    if isinstance(model, Broken):
        return {"version": model.version, "broken": model.reason}
    return {
        "version": model.version,
        "latency_ms": model.latency_ms,
        "memory_bytes": model.memory_bytes,
        "size_bytes": model.size_bytes,
        "f1_weighted": scores.f1_weighted if scores else None,
        "f1_macro": scores.f1_macro if scores else None,
    }


def _class_evidence(
    holdout: Holdout, scores: _Scores | None, champion_scores: _Scores | None, gains: Gains | None
) -> dict[str, Any]:
    return {
        label: {
            "support": holdout.actual.count(label),
            "candidate_recall": scores.recall[label] if scores else None,
            "champion_recall": champion_scores.recall[label] if champion_scores else None,
            "recall_gain": asdict(gains.recall[label]) if gains else None,
        }
        for label in _classes(holdout)
    }


def _never_answered(holdout: Holdout, champion: Measured | Broken | None) -> list[str] | None:
    if not isinstance(champion, Measured):
        return None
    return sorted(set(holdout.actual) - set(champion.predicted))


def _check(holdout: Holdout, candidate: Measured | Broken, champion: Measured | Broken | None) -> None:
    _check_length("group", holdout.group, holdout)
    if "" in holdout.actual:
        raise ValueError("Expected a label for every holdout row, but one has none.")
    for model in (candidate, champion):
        if isinstance(model, Measured):
            _check_length(f"predicted of version {model.version}", model.predicted, holdout)
            for name in ("latency_ms", "memory_bytes", "size_bytes"):
                cost = getattr(model, name)
                if not (cost > 0 and math.isfinite(cost)):
                    raise ValueError(f"Expected `{name}` of version {model.version} to be positive, but got {cost}.")


def _check_bootstrap(holdout: Holdout, models: dict[str, Sequence[str]], confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"Expected `confidence` to be between 0 and 1, but got {confidence}.")
    if not holdout.actual:
        raise ValueError("Expected at least one holdout row, but got none.")
    for name, labels in ({"group": holdout.group} | models).items():
        _check_length(name, labels, holdout)


def _check_length(name: str, labels: Sequence[str], holdout: Holdout) -> None:
    if len(labels) != len(holdout.actual):
        raise ValueError(f"Expected {len(holdout.actual)} entries in `{name}`, one a row, but got {len(labels)}.")


def _named(model: Measured | Broken) -> str:
    return "The candidate" if model.version == "candidate" else f"Version {model.version}"


def _decimals(value: float, limit: float, sign: Literal["", "+"] = "", least: int = 3) -> str:
    """A number with at least `least` decimals, and as many more as show on which side of `limit` it lies."""
    for decimals in range(least, DECIMALS):
        shown = f"{value:{sign}.{decimals}f}"
        if np.sign(float(shown) - limit) == np.sign(value - limit):
            return shown
    return f"{value:{sign}.{DECIMALS}f}"


def _digits(cost: float) -> str:
    """A positive number with two significant digits, or all those before the point."""
    return f"{cost:,.{max(0, 1 - math.floor(math.log10(cost)))}f}"
