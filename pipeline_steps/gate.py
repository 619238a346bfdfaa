"""The promotion gate: from two models' answers on the holdout, and what they cost, to a decision with its reasons."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from pipeline_steps.bootstrap import (
    DECIMALS,
    N_RESAMPLES,
    Answers,
    Estimate,
    Gains,
    Holdout,
    check_answers,
    check_holdout,
    paired_bootstrap,
)
from pipeline_steps.gate_scores import Scores, scores_of, support, target_evidence
from pipeline_steps.params import Floors, Promotion

Decision = Literal["promoted", "challenger", "rejected"]
Finding = tuple[Decision, str]  # what a model can become at best in the light of one sentence
SEVERITY: tuple[Decision, ...] = ("rejected", "challenger", "promoted")


@dataclass(frozen=True)
class Measured:
    """What a package showed in a fresh process: its answers on the holdout rows, and what they cost."""

    version: str  # such as "7" or "candidate"; for sentences
    predicted: Answers  # for each holdout row, in the holdout's order
    latency_ms: float  # median of single images
    memory_bytes: int  # peak resident
    size_bytes: int  # of the package's files


@dataclass(frozen=True)
class Broken:
    """A package that did not load, or did not answer a real image."""

    version: str
    reason: str  # one sentence without a full stop at its end


@dataclass(frozen=True)
class Unlike:
    """A champion that answers other targets than the candidate: no score compares the two."""

    version: str
    answers: list[str]  # its targets, as words of a sentence
    asked: list[str]  # the candidate's


Champion = Measured | Broken | Unlike


@dataclass(frozen=True)
class Verdict:
    """What becomes of a candidate, and why.

    `evidence` holds only what JSON knows, always under the same keys; what could not be measured is None:

    - n_rows, n_groups; settings (of `promotion` in params.yaml), seed, n_resamples;
    - candidate, champion: version and either broken (the reason), or answers and asked (targets of a champion that
      answers others), or latency_ms, memory_bytes, size_bytes, f1_weighted and f1_macro (means over the targets);
    - gain: value, low and high, in weighted F1 (mean over the targets);
    - targets: target to candidate and champion (f1_weighted, f1_macro), gain, classes (class to support,
      candidate_recall, champion_recall and recall_gain) and never_answered_by_champion (classes of the holdout that
      the champion names for no row, as those it never learned);
    - cost_ratios: latency, memory and size, the candidate's as a multiple of the champion's.
    """

    decision: Decision
    reasons: list[str]  # whole sentences, the deciding one first
    evidence: dict[str, Any]


def judge(
    settings: Promotion, holdout: Holdout, candidate: Measured | Broken, champion: Champion | None, seed: int = 0
) -> Verdict:
    """Decides whether a trained candidate becomes champion, stays a challenger, or neither.

    Rejected is what is broken, cannot be judged, misses a floor, scores lower than the champion, or loses a class.
    A challenger is what is not shown to be better by more than `min_gain`, costs too much, or answers other targets
    than the champion, which only a person can weigh. The rest is promoted.
    Floors and gain are of the mean over the targets; a class is lost in any of them.

    Args:
        settings: the block `promotion` of params.yaml; `mode` is the caller's.
        holdout: may be empty, which is a reason to reject.
        candidate: the package to judge.
        champion: None where no model was ever promoted; one that is broken is compared with no more than an absent one.
        seed: of the bootstrap.

    Raises:
        ValueError: targets or lengths differ, a row has no label, or a cost is no positive number.
    """
    _check(holdout, candidate, champion)
    rows = bool(holdout.group)
    scores = scores_of(holdout, candidate.predicted) if rows and isinstance(candidate, Measured) else None
    champion_scores = scores_of(holdout, champion.predicted) if rows and isinstance(champion, Measured) else None
    champion_answers = champion.predicted if isinstance(champion, Measured) else None
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
    elif isinstance(champion, Unlike):
        findings.append(("challenger", _not_compared(candidate, champion, rejected=bool(findings))))
    elif isinstance(candidate, Measured):
        if scores and champion_scores:
            gains = paired_bootstrap(holdout, candidate.predicted, champion.predicted, settings.confidence, seed)
            gain = gains.f1_weighted.mean
            findings.append(_compared(settings, candidate, champion, scores, champion_scores, gain))
            findings += _collapsed(settings, holdout, scores, champion_scores, gains)
        ratios = _cost_ratios(candidate, champion)
        findings += _too_costly(settings, candidate, champion, ratios)
    if scores and not missed:
        findings.append(("promoted", _reached_floors(settings.floors, candidate, scores)))

    findings.sort(key=lambda finding: SEVERITY.index(finding[0]))  # stable: in the order above among equals
    evidence = {
        "n_rows": len(holdout.group),
        "n_groups": len(set(holdout.group)),
        "settings": settings.model_dump(),
        "seed": seed,
        "n_resamples": N_RESAMPLES,
        "candidate": _model_evidence(candidate, scores),
        "champion": _model_evidence(champion, champion_scores) if champion else None,
        "gain": asdict(gains.f1_weighted.mean) if gains else None,
        "targets": {
            target: target_evidence(holdout, target, scores, champion_scores, gains, champion_answers)
            for target in holdout.actual
        },
        "cost_ratios": ratios,
    }
    return Verdict(findings[0][0], [sentence for _, sentence in findings], evidence)


def _cost_ratios(candidate: Measured, champion: Measured) -> dict[str, float]:
    return {
        "latency": round(candidate.latency_ms / champion.latency_ms, DECIMALS),
        "memory": round(candidate.memory_bytes / champion.memory_bytes, DECIMALS),
        "size": round(candidate.size_bytes / champion.size_bytes, DECIMALS),
    }


def _missed_floors(floors: Floors, candidate: Measured | Broken, scores: Scores) -> list[Finding]:
    findings: list[Finding] = []
    for name, score, floor in (
        ("weighted F1", scores.f1_weighted, floors.f1_weighted),
        ("macro F1", scores.f1_macro, floors.f1_macro),
    ):
        if score < floor:
            found = f"{_named(candidate)} has a {name} of {_decimals(score, floor)} on the holdout{scores.over}"
            findings.append(("rejected", f"{found}, below the floor of {floor:.10g}."))
    return findings


def _reached_floors(floors: Floors, candidate: Measured | Broken, scores: Scores) -> str:
    weighted = f"weighted F1 {_decimals(scores.f1_weighted, floors.f1_weighted)} (floor {floors.f1_weighted:.10g})"
    macro = f"macro F1 {_decimals(scores.f1_macro, floors.f1_macro)} (floor {floors.f1_macro:.10g})"
    return f"{_named(candidate)} reaches the floors on the holdout{scores.over}: {weighted} and {macro}."


def _not_compared(candidate: Measured | Broken, champion: Unlike, rejected: bool) -> str:
    reason = (
        f"Champion version {champion.version} answers other targets ({', '.join(champion.answers)}) than are asked for "
        f"now ({', '.join(champion.asked)}), so the two cannot be compared"
    )
    if rejected:
        return f"{reason}."
    if candidate.version == "candidate":
        return f"{reason}, and only a person can promote the candidate."
    return f"{reason}, and only a person can promote it: with `pleat approve {candidate.version}`."


def _compared(
    settings: Promotion,
    candidate: Measured,
    champion: Measured,
    scores: Scores,
    champion_scores: Scores,
    gain: Estimate,
) -> Finding:
    """What the gain in weighted F1 allows the candidate to become."""
    name, other = _named(candidate), f"champion version {champion.version}"
    n_rows, over = len(next(iter(candidate.predicted.values()))), scores.over
    least, score = settings.min_gain, scores.f1_weighted
    if candidate.predicted == champion.predicted:
        reason = f"{name} gives the same answers as {other} on all {n_rows:,} holdout images, so it gains nothing"
        return "challenger", f"{reason}: weighted F1 {score:.3f}{over} for both."
    low, high = _decimals(gain.low, least, "+"), _decimals(gain.high, 0, "+")
    interval = f"{100 * settings.confidence:.10g}% interval"
    numbers = (
        f"weighted F1 {score:.3f} against {champion_scores.f1_weighted:.3f}{over} on {n_rows:,} holdout images, a gain "
        f"of {_decimals(gain.value, 0, '+')} with a {interval} of {low} to {high}"
    )
    if gain.high < 0:
        return "rejected", f"{name} scores lower than {other}: {numbers}, all of it below 0, so this is not noise."
    if gain.value < 0:
        return "rejected", f"{name} scores lower than {other}, though within noise: {numbers}."
    if gain.value == 0:
        reason = f"{name} has the same score as {other}, with other answers: weighted F1 {score:.3f}{over} for both on"
        return "challenger", f"{reason} {n_rows:,} holdout images, a gain of 0 with a {interval} of {low} to {high}."
    if gain.low <= 0:
        return "challenger", f"{name} scores better than {other}, but within noise: {numbers}, which is not above 0."
    if gain.low <= least:
        reason = f"{name} scores better than {other}, but not surely by more than the required {least:.10g}"
        return "challenger", f"{reason}: {numbers}."
    return "promoted", f"{name} scores better than {other}: {numbers}, all of it above {least:.10g}."


def _collapsed(
    settings: Promotion, holdout: Holdout, scores: Scores, champion_scores: Scores, gains: Gains
) -> list[Finding]:
    """One finding for each class that the candidate loses, the worst first."""
    findings: list[Finding] = []
    interval = f"{100 * settings.confidence:.10g}% interval"
    every = [(target, *item) for target, recall in gains.recall.items() for item in recall.items()]
    for target, label, gain in sorted(every, key=lambda item: item[2].value):
        if -gain.value > settings.max_class_drop and gain.high < 0:
            before, after = (model.targets[target].recall[label] for model in (champion_scores, scores))
            drop = f"{_decimals(-gain.high, 0)} to {_decimals(-gain.low, 0)}"
            reason = (
                f"Class '{label}'{f' of {target}' if len(gains.recall) > 1 else ''} collapses: its recall falls from "
                f"{before:.3f} to {after:.3f} on {support(holdout, target, label):,} holdout images, by "
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


def _model_evidence(model: Champion, scores: Scores | None) -> dict[str, Any]:
    if isinstance(model, Broken):
        return {"version": model.version, "broken": model.reason}
    if isinstance(model, Unlike):
        return asdict(model)
    return {
        "version": model.version,
        "latency_ms": model.latency_ms,
        "memory_bytes": model.memory_bytes,
        "size_bytes": model.size_bytes,
        "f1_weighted": scores.f1_weighted if scores else None,
        "f1_macro": scores.f1_macro if scores else None,
    }


def _check(holdout: Holdout, candidate: Measured | Broken, champion: Champion | None) -> None:
    check_holdout(holdout)
    for model in (candidate, champion):
        if isinstance(model, Measured):
            check_answers(f"predicted of version {model.version}", model.predicted, holdout)
            for name in ("latency_ms", "memory_bytes", "size_bytes"):
                cost = getattr(model, name)
                if not (cost > 0 and math.isfinite(cost)):
                    raise ValueError(f"Expected `{name}` of version {model.version} to be positive, but got {cost}.")


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
