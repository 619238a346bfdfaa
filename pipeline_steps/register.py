"""Stage `register`: the refitted model is judged against the champion, and takes its place where it is better."""

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline_steps import gate, pages
from pipeline_steps.files import atomic_folder, read_json, read_parquet, write_json, write_text
from pipeline_steps.gate import Broken, Measured, Verdict
from pipeline_steps.measure import measure
from pipeline_steps.packed import read_images
from pipeline_steps.params import Params, plain_label
from pipeline_steps.progress import say
from pipeline_steps.refit import TRAINED_ON
from pipeline_steps.versions import code_version

CANDIDATE = "candidate"


@dataclass(frozen=True)
class Outcome:
    """What came of it; `event` is the kind in the history, None for a dry run."""

    version: str
    champion: str  # now in use; empty for none
    event: str | None
    verdict: Verdict


def run(params: Params, root: Path = Path()) -> Outcome:
    """Registers data/refit/package as a version, judges it, writes the history and reports/registration.

    What was judged before against the same champion, rows and settings is not judged again. Where another model became
    champion in the meantime, the candidate is judged again against that one.

    Raises:
        PleatError: the stage refit has not run, or MLflow cannot be reached (temporary).
    """
    from pipeline_steps.registry import Registry, reachable
    from pipeline_steps.tracking import Tracker

    mode, packaged = params.promotion.mode, root / "data" / "refit" / "package"
    about = read_json(root / "data" / "refit" / "metrics.json")
    rows = read_parquet(root / "data" / "refit" / "holdout.parquet")
    with reachable(), tempfile.TemporaryDirectory(prefix="pleat-register-") as scratch:
        registry = Registry(params.promotion.model)
        images = _write_images(rows, root, Path(scratch) / "images")
        version = CANDIDATE
        if mode != "dry_run":
            travels = read_json(packaged / "about.json")
            tags = {f"pleat.{name}": str(travels[name]) for name in ("model", "data_version")}
            tags["pleat.code_version"] = code_version(root)
            run_id = Tracker(params, root).refit(about)
            version = registry.register(packaged, about["package"], run_id, tags)
            candidate = registry.download(version, _new(Path(scratch), "candidate"))
        else:
            candidate = registry.save(packaged, _new(Path(scratch), "candidate") / "model")
        outcome = None
        while outcome is None:
            outcome = _judge(params, registry, version, candidate, rows, images, Path(scratch))
    _report(params, root, outcome)
    return outcome


def _judge(
    params: Params,
    registry: Any,
    version: str,
    candidate: Path,
    rows: pd.DataFrame,
    images: Sequence[Path],
    scratch: Path,
) -> Outcome | None:
    """Judges once; None where the champion changed meanwhile."""
    mode, champion = params.promotion.mode, registry.champion()
    basis = {"promotion": params.promotion.model_dump(), "rows": _names(rows)}
    for event in reversed(registry.history()):
        same = event.before == champion and event.evidence.get("basis") == basis
        if event.version == version and event.counts and "decision" in event.evidence and (same or champion == version):
            say(f"register: version {version} was judged already: {event.kind}")
            verdict = Verdict(event.evidence["decision"], event.reasons, event.evidence)
            return Outcome(version, champion, event.kind, verdict)
    folder = None
    if champion and champion != version:
        folder = registry.download(champion, _new(scratch, f"champion-{champion}"))
    verdict = _verdict(params, version, candidate, champion, folder, rows, images)
    evidence = {**verdict.evidence, "decision": verdict.decision, "basis": basis}
    if mode == "dry_run":
        return Outcome(version, champion, None, verdict)
    kind: str = verdict.decision
    if kind == "promoted" and mode == "approve":
        kind = "approval requested"
    after = version if kind == "promoted" else champion
    event = registry.record(kind, version, champion, after, verdict.reasons, evidence)
    if not event.counts:
        now = registry.champion()
        say(f"register: version {now} became champion meanwhile; version {version} is judged again, against it.")
        return None
    tags = {"pleat.verdict": kind, "pleat.judged_against": champion or "none"}
    registry.describe(version, f"{kind.capitalize()}. " + " ".join(verdict.reasons), tags)
    return Outcome(version, registry.champion(), kind, verdict)


def _verdict(
    params: Params,
    version: str,
    candidate: Path,
    champion: str,
    champion_folder: Path | None,
    rows: pd.DataFrame,
    images: Sequence[Path],
) -> Verdict:
    """Scores both on the rows that neither was trained on, each in a process of its own."""
    models, broken = [(version, candidate)], None
    seen = _trained_on(candidate)
    if champion_folder:
        try:
            seen |= _trained_on(champion_folder)
            models.append((champion, champion_folder))
        except FileNotFoundError:
            broken = Broken(champion, "it was not made by Pleat, so what it was trained on is not known")
    fair = ~rows["sample_id"].isin(seen)
    if not fair.all():
        say(f"register: {int((~fair).sum()):,} holdout rows do not count: one of the models was trained on them")
    rows, images = rows[fair], [path for path, good in zip(images, fair, strict=True) if good]
    example = candidate / "artifacts" / "package" / "example.jpg"  # where there is no holdout, it must answer this one
    measured = measure(models, images or [example])
    if not images:
        measured = [replace(item, predicted=[]) if isinstance(item, Measured) else item for item in measured]
    merged = {plain_label(old): new for old, new in params.labels.merge.items()}  # an older model knows the old names
    renamed = [_renamed(found, merged) for found in measured]
    holdout = gate.Holdout(rows["label"].tolist(), rows["group"].tolist())
    verdict = gate.judge(params.promotion, holdout, renamed[0], broken or (renamed[1] if champion_folder else None))
    if len(fair) and not len(rows):
        reason = "One of the models was trained on every row of the holdout, so nothing can be judged on it."
        return replace(verdict, reasons=[reason, *(line for line in verdict.reasons if "holdout is empty" not in line)])
    return verdict


def _renamed(found: Measured | Broken, merged: Mapping[str, str]) -> Measured | Broken:
    if isinstance(found, Broken):
        return found
    return replace(found, predicted=[merged.get(plain_label(label), label) for label in found.predicted])


def _trained_on(folder: Path) -> set[str]:
    """Sample ids that a model learned from, as they travel with it."""
    return set((folder / "artifacts" / "package" / TRAINED_ON).read_text().split())


def _write_images(rows: pd.DataFrame, root: Path, folder: Path) -> list[Path]:
    """The encoded images of the holdout as files, in the order of the rows."""
    folder.mkdir()
    found: dict[str, bytes] = {}
    for batch, part in rows.groupby("batch"):
        found |= read_images(root / "data" / "ingest" / str(batch) / "images.arrow", part["sample_id"].tolist())
    paths = [folder / str(sample_id) for sample_id in rows["sample_id"]]
    for path in paths:
        path.write_bytes(found[path.name])
    return paths


def _names(rows: pd.DataFrame) -> str:
    """Names the rows that were judged on, and their labels."""
    return hashlib.sha256("".join(rows["sample_id"] + rows["label"]).encode()).hexdigest()[:16]


def _new(folder: Path, name: str) -> Path:
    (folder / name).mkdir(exist_ok=True)
    return folder / name


def _report(params: Params, root: Path, outcome: Outcome) -> None:
    verdict, mode = outcome.verdict, params.promotion.mode
    names = {"promoted": "is the champion", "approval requested": "waits for approval"}
    became = names.get(outcome.event, f"is {outcome.event}") if outcome.event else f"would be {verdict.decision}"
    title = f"Version {outcome.version} {became}" if outcome.event else f"The {CANDIDATE} {became} (dry run)"
    with atomic_folder(root / "reports" / "registration") as out:
        content = {"title": title, "outcome": outcome, "mode": mode, "evidence": verdict.evidence}
        write_text(out / "index.html", pages.render("registration.html.j2", **content))
        write_json(out / "verdict.json", {"title": title, "version": outcome.version, "event": outcome.event,
                                          "champion": outcome.champion, **asdict(verdict)})  # fmt: skip
    say(f"{title}.")
    for reason in verdict.reasons:
        say(f"  {reason}")
    if outcome.event == "approval requested":
        say(f"  `pleat approve {outcome.version}` makes it the champion; with --decline it stays behind.")
