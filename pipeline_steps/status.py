"""`pleat status`: what is champion, what lies in the inbox, what ran last."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from pipeline_steps import inbox
from pipeline_steps.errors import PleatError
from pipeline_steps.params import Params
from pipeline_steps.progress import say
from pipeline_steps.registry import CHANGES, Registry, challenger_of, reachable
from pipeline_steps.tracking import newest_pipeline_run
from pipeline_steps.versions import data_version_of_files


def show(params: Params, root: Path = Path()) -> None:
    """Prints the state of registry, inbox and pipeline; a part that cannot be reached is said and the rest is shown."""
    for title, part in (("Champion", _champion), ("Inbox", _inbox), ("Last run", _last_run)):
        try:
            lines = part(params, root)
        except PleatError as error:
            lines = [str(error)]
        say(f"{title:9} {lines[0]}")
        for line in lines[1:]:
            say(f"{'':9} {line}")


def _champion(params: Params, _: Path) -> list[str]:
    with reachable():
        registry = Registry(params.promotion.model)
        champion, events = registry.champion(), registry.history()
        if not champion:
            return [f"none: no version of {registry.name} was promoted yet"]
        tags = registry.client.get_model_version(registry.name, champion).tags
    since = next(event for event in reversed(events) if event.counts and event.kind in CHANGES)
    lines = [
        f"version {champion} of {registry.name} ({tags.get('pleat.model', 'not made by Pleat')}), {since.kind} "
        f"{since.at[:16].replace('T', ' ')} UTC by {since.actor}",
        f"trained on {tags.get('pleat.data_version', 'unknown data')}",
    ]
    judged = [event for event in events if event.version == champion and event.evidence.get("candidate")]
    if judged and judged[-1].evidence["candidate"].get("f1_weighted") is not None:
        evidence = judged[-1].evidence
        lines.append(f"{_f1(evidence['candidate'])} on {evidence['n_rows']:,} of the holdout")
        targets = evidence.get("targets", {})  # events of older versions have none
        if len(targets) > 1:
            lines += [f"  {name}: {_f1(target['candidate'])}" for name, target in targets.items()]
    if challenger := challenger_of(events):
        asked = next(event for event in reversed(events) if event.version == challenger)
        lines.append(f"behind it: version {challenger} ({asked.kind})")
    return lines


def _f1(scores: Mapping[str, float]) -> str:
    return f"weighted F1 {scores['f1_weighted']:.3f}, macro F1 {scores['f1_macro']:.3f}"


def _inbox(params: Params, root: Path) -> list[str]:
    found = inbox.waiting(params, root)
    if not found:
        return [f"{params.inbox.source} is empty"]
    lines = [f"{params.inbox.source} holds {len(found):,}; `pleat inbox` takes what is complete"]
    for delivery in found:
        state = delivery.wait(params.inbox.settle_s) or "complete"
        lines.append(f"{delivery.name}: {delivery.n_files():,} files, {delivery.n_bytes / 1e6:,.1f} MB; {state}")
    return lines


def _last_run(params: Params, root: Path) -> list[str]:
    with reachable():
        run = newest_pipeline_run()
    if run is None:
        return ["none yet; `dvc repro` runs the pipeline"]
    tags = run.data.tags
    when = datetime.fromtimestamp(run.info.start_time / 1000, UTC).strftime("%Y-%m-%d %H:%M")
    chosen = f"{tags['pleat.chosen']} came first" if "pleat.chosen" in tags else "nothing was chosen yet"
    lines = [f"{when} UTC, recipe {tags['pleat.recipe']}: {run.info.status.lower()}, {chosen}"]
    now = data_version_of_files(params.experiment.batches, root)
    same = tags["pleat.data_version"] == now
    lines.append(f"on {tags['pleat.data_version']}" + (", as the data is now" if same else f"; the data is now {now}"))
    return lines
