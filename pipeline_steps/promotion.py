"""`pleat approve`, `pleat rollback`, `pleat history`: what people decide about models, and what was decided."""

import tempfile
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline_steps import isolated
from pipeline_steps.errors import PleatError
from pipeline_steps.params import Params
from pipeline_steps.progress import say
from pipeline_steps.registry import Event, Registry, champion_of, former_champions, reachable

LOG_WIDTH = 160  # columns where the output is no terminal


def approve(params: Params, version: str | None, decline: bool, comment: str, by: str | None = None) -> Event:
    """Makes a version champion that waits for approval, or declines it.

    Args:
        params: for the model's name.
        version: the newest one that waits where it is None.
        decline: whether it stays behind the champion for good.
        comment: the person's words for the history.
        by: who decided, where that is not who runs this.

    Raises:
        PleatError: nothing waits, the version does not, or another model became champion since it was judged.
    """
    with reachable():
        registry = Registry(params.promotion.model)
        champion = registry.champion()
        asked = _waiting(registry.history(), version)
        if asked is None:
            named = f"Version {version} of {registry.name}" if version else f"No version of {registry.name}"
            raise PleatError(f"{named} waits for approval; `pleat history` lists what was decided.")
        if asked.before != champion:
            raise PleatError(
                f"Version {asked.version} was judged against {_named(asked.before)}, but now {_named(champion)} is the "
                "champion; judge it again with `pleat register`."
            )
        kind = "declined" if decline else "approved"
        after = champion if decline else asked.version
        event = registry.record(kind, asked.version, champion, after, [comment] if comment else [], {}, by)
        if not event.counts:
            raise PleatError("Another model became champion at this moment; judge again with `pleat register`.")
        registry.describe(asked.version, f"{kind.capitalize()}. {comment}".strip(), {"pleat.verdict": kind})
    say(f"Version {asked.version} is declined." if decline else f"Version {asked.version} is the champion.")
    return event


def rollback(params: Params, to: str | None, comment: str) -> Event:
    """Puts the previous champion back, after its package has answered an image in a process of its own.

    Args:
        params: for the model's name.
        to: a version to go back to instead of the previous champion.
        comment: the person's words for the history.

    Raises:
        PleatError: there is no such version, it does not answer, or somebody changed the champion at this moment.
    """
    with reachable():
        registry = Registry(params.promotion.model)
        champion = registry.champion()
        former = [version for version in former_champions(registry.history()) if registry.exists(version)]
        version = to or next((version for version in former if version != champion), None)
        if version is None:
            raise PleatError(f"{registry.name} had no champion before {_named(champion)}: nothing to go back to.")
        if version == champion:
            raise PleatError(f"Version {version} is the champion already.")
        if not registry.exists(version):
            raise PleatError(f"{registry.name} has no version {version}; `pleat history` lists those there were.")
        _answers(registry, version)
        event = registry.record("rolled back", version, champion, version, [comment] if comment else [], {})
        if not event.counts:
            raise PleatError("Somebody else changed the champion at this moment; look at `pleat history`.")
    say(f"Version {version} is the champion again, instead of {_named(champion)}.")
    return event


def history(params: Params) -> None:
    """Prints every event, the oldest first.

    Raises:
        PleatError: MLflow cannot be reached.
    """
    with reachable():
        registry = Registry(params.promotion.model)
        registry.champion()
        events = registry.history()
    if not events:
        say(f"{registry.name} has no history yet; `dvc repro` registers the first version.")
        return
    table = Table(box=box.SIMPLE_HEAD, title=f"Decisions about {registry.name}", title_justify="left")
    for title in ("", "Time (UTC)", "Event", "Version", "Champion", "By", "Why"):
        table.add_column(title, justify="right" if title in ("", "Version") else "left", overflow="fold")
    for event in events:
        changed = event.before != event.after and event.counts
        champion = f"{event.before or '—'} → {event.after or '—'}" if changed else event.before or "—"
        kind = event.kind if event.counts else f"{event.kind} (void: another came first)"
        when, why = event.at[:19].replace("T", " "), " ".join(event.reasons)
        cells = (str(event.number), when, kind, event.version, champion, event.actor, why)
        table.add_row(*map(Text, cells), style="" if event.counts else "dim")
    console = Console()
    (console if console.is_terminal else Console(width=LOG_WIDTH)).print(table)
    say(f"Champion: {_named(champion_of(events))}")


def _waiting(events: list[Event], version: str | None) -> Event | None:
    """The newest request for approval, of the version where one is given, that nobody has answered."""
    answered: set[str] = set()
    for event in reversed(events):
        if event.counts and event.kind in ("approved", "declined"):
            answered.add(event.version)
        elif event.counts and event.kind == "approval requested" and version in (None, event.version):
            return None if event.version in answered else event
    return None


def _answers(registry: Registry, version: str) -> None:
    with tempfile.TemporaryDirectory(prefix="pleat-rollback-") as scratch:
        folder = registry.download(version, Path(scratch))
        try:
            with isolated.start(isolated.requirements_of(folder)) as model:
                model.load(folder)
                (row,) = model.answers([folder / "artifacts" / "package" / "example.jpg"])
                if row["error"]:
                    raise isolated.BrokenError(f"it cannot read its own example ({row['error']})")
        except isolated.BrokenError as error:
            raise PleatError(
                f"Version {version} is broken: {error}. The champion stays as it was; "
                "`pleat rollback --to VERSION` goes back to another one."
            ) from None


def _named(version: str) -> str:
    return f"version {version}" if version else "none"
