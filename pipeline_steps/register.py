"""Stage `register`: the refitted model is judged against the champion, and takes its place where it is better.

With `compress.candidate` it is that cheaper version of the model.

It runs every time, since the registry lies outside of DVC; what was judged before costs only a few questions, and none
where the store is a local file that nobody has written to since.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_steps.compress import candidate
from pipeline_steps.files import atomic_folder, read_json, write_json, write_text
from pipeline_steps.params import Params
from pipeline_steps.progress import say
from pipeline_steps.versions import LOCAL_STORE, code_version, digest

if TYPE_CHECKING:
    from pipeline_steps.gate import Verdict
    from pipeline_steps.registry import Registry

CANDIDATE = "candidate"
REMEMBERED = Path(".pleat/registered.json")
OPEN_OR_REJECTED = ("challenger", "approval requested", "rejected")


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        version: of the candidate; "candidate" in a dry run.
        champion: the version that is in use now; empty for none.
        event: the kind of event in the history; None in a dry run.
        decision: of the gate: promoted, challenger or rejected.
        reasons: sentences.
        evidence: the figures behind them, as `gate.Verdict` has them.
    """

    version: str
    champion: str
    event: str | None
    decision: str
    reasons: list[str]
    evidence: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """An outcome as it is told."""

    outcome: Outcome
    title: str
    page: str  # HTML


def run(params: Params, root: Path = Path()) -> Outcome:
    """Registers the package as a version, judges it, writes the history and reports/registration.

    The package is data/refit/package, or that of `compress.candidate`.

    What was judged before against the same champion, rows and settings is not judged again. Where another model became
    champion in the meantime, the candidate is judged again against that one.

    Raises:
        PleatError: the stage refit has not run, or MLflow cannot be reached (temporary).
    """
    about, packaged = candidate(params, root)
    basis = {"promotion": params.promotion.model_dump(), "holdout": about["holdout"]}
    key = digest(json.dumps(basis, sort_keys=True), about["package"])
    last = _remembered(root, key)
    if last is not None:
        say(f"register: version {last.outcome.version} was judged already")
        _write(root, last)
        return last.outcome
    from pipeline_steps.registry import Registry, reachable
    from pipeline_steps.tracking import Tracker

    with reachable():
        registry = Registry(params.promotion.model)
        if params.promotion.mode == "dry_run":
            outcome = _dry_run(params, root, registry, packaged)
        else:
            run_id = Tracker(params, root).refit(about)
            version = registry.version_of(about["package"])
            known = _known(registry, version, basis) if version else None
            outcome = known or _judge(params, root, registry, about, packaged, run_id, basis)
    report = _report(params, outcome)
    _write(root, report)
    if outcome.event:
        write_json(root / REMEMBERED, {"key": key, "store": _store(), **asdict(report)})
    return outcome


def _remembered(root: Path, key: str) -> Report | None:
    """What came of it last time, where neither the question nor a local store has changed; MLflow takes seconds."""
    if not (root / REMEMBERED).is_file() or not _store():
        return None
    last = read_json(root / REMEMBERED)
    if (last.pop("key"), last.pop("store")) != (key, _store()):
        return None
    return Report(**last | {"outcome": Outcome(**last["outcome"])})


def _store() -> str:
    """Names the state of the SQLite file that MLflow uses; empty for a server."""
    path = Path((os.environ.get("MLFLOW_TRACKING_URI") or LOCAL_STORE).removeprefix("sqlite:///"))
    files = [path, path.with_name(f"{path.name}-wal")]
    if not path.is_file():
        return ""
    return " ".join(
        f"{file.absolute()} {file.stat().st_mtime_ns} {file.stat().st_size}" for file in files if file.is_file()
    )


def _known(registry: "Registry", version: str, basis: dict[str, Any]) -> Outcome | None:
    """What was decided about the version, where nothing has changed since."""
    champion = registry.champion()
    events = [event for event in registry.history() if event.counts]
    about = [event for event in events if event.version == version]
    for event in reversed(about):
        same = event.before == champion and event.evidence.get("basis") == basis
        if "decision" in event.evidence and (same or champion == version):
            say(f"register: version {version} was judged already")
            kind = "promoted" if champion == version else about[-1].kind
            if kind != "declined" and champion != version and event.kind not in OPEN_OR_REJECTED:
                kind = "rolled back"
            return Outcome(version, champion, kind, event.evidence["decision"], event.reasons, event.evidence)
    return None


def _dry_run(params: Params, root: Path, registry: "Registry", packaged: Path) -> Outcome:
    from pipeline_steps import judging

    with tempfile.TemporaryDirectory(prefix="pleat-register-") as scratch:
        candidate = registry.save(packaged, Path(scratch) / "candidate")
        champion = registry.champion()
        folder = _fetch(registry, champion, Path(scratch))
        verdict = judging.verdict(params, root, CANDIDATE, candidate, champion, folder)
    return Outcome(CANDIDATE, champion, None, verdict.decision, verdict.reasons, verdict.evidence)


def _judge(
    params: Params,
    root: Path,
    registry: "Registry",
    about: dict[str, Any],
    packaged: Path,
    run_id: str,
    basis: dict[str, Any],
) -> Outcome:
    from pipeline_steps import judging

    travels = read_json(packaged / "about.json")
    tags = {f"pleat.{name}": str(travels[name]) for name in ("model", "data_version")}
    tags["pleat.code_version"] = code_version(root)
    told = ""
    if "compression" in travels:
        tags["pleat.compression"] = travels["compression"]["name"]
        told = f"A cheaper version of {travels['model']}: {travels['compression']['told']}. "
    version = registry.register(packaged, about["package"], run_id, tags)
    with tempfile.TemporaryDirectory(prefix="pleat-register-") as scratch:
        candidate = _fetch(registry, version, Path(scratch))
        assert candidate is not None
        while True:
            champion = registry.champion()
            folder = _fetch(registry, champion, Path(scratch)) if champion != version else None
            verdict = judging.verdict(params, root, version, candidate, champion, folder)
            evidence = {**verdict.evidence, "decision": verdict.decision, "basis": basis}
            waits = _waits(params, verdict)
            kind = "approval requested" if waits else verdict.decision
            after = version if kind == "promoted" else champion
            event = registry.record(kind, version, champion, after, verdict.reasons, evidence)
            if event.counts:
                break
            now = registry.champion()
            say(f"register: version {now} became champion meanwhile; version {version} is judged again, against it")
    judged = {"pleat.verdict": kind, "pleat.judged_against": champion or "none"}
    registry.describe(version, f"{kind.capitalize()}. {told}" + " ".join(verdict.reasons), judged)
    return Outcome(version, registry.champion(), kind, verdict.decision, verdict.reasons, evidence)


def _waits(params: Params, verdict: "Verdict") -> bool:
    """Whether a person is asked: where that is the mode, and always where the champion answers other targets."""
    if "asked" in (verdict.evidence["champion"] or {}):
        return verdict.decision == "challenger"
    return verdict.decision == "promoted" and params.promotion.mode == "approve"


def _fetch(registry: "Registry", version: str, scratch: Path) -> Path | None:
    """The version's MLflow model in a folder of its own; None where there is no version."""
    return registry.download(version, Path(tempfile.mkdtemp(dir=scratch))) if version else None


def _report(params: Params, outcome: Outcome) -> Report:
    from pipeline_steps import pages

    names = {
        "promoted": "is the champion",
        "approval requested": "waits for approval",
        "rolled back": f"was rolled back; version {outcome.champion} is the champion",
    }
    became = names.get(outcome.event, f"is {outcome.event}") if outcome.event else f"would be {outcome.decision}"
    title = f"Version {outcome.version} {became}" if outcome.event else f"The {CANDIDATE} {became} (dry run)"
    content = {"title": title, "outcome": outcome, "mode": params.promotion.mode, "evidence": outcome.evidence}
    return Report(outcome, title, pages.render("registration.html.j2", **content))


def _write(root: Path, report: Report) -> None:
    outcome = report.outcome
    with atomic_folder(root / "reports" / "registration") as out:
        write_text(out / "index.html", report.page)
        write_json(out / "verdict.json", {"title": report.title, **asdict(outcome)})
    say(f"{report.title}.")
    for reason in outcome.reasons:
        say(f"  {reason}")
    if outcome.event == "approval requested":
        say(f"  `pleat approve {outcome.version}` makes it the champion; with --decline it stays behind.")
