"""New data: what arrived in the inbox becomes a batch once it was checked, or is set aside with the reasons.

A decision about a delivery is written down in .pleat/inbox/decisions before anything is done about it, and every step
after that can be repeated, so a kill at any point and another `take` end as if there had been no kill.
"""

import errno
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from pipeline_steps import archives, data_add, deliveries, versions
from pipeline_steps import params as settings
from pipeline_steps.deliveries import DONE, SET_ASIDE, Delivery, Inbox, RefusedError
from pipeline_steps.errors import PleatError
from pipeline_steps.files import write_text
from pipeline_steps.inbox_decisions import STATE, Decision, Outcome, decisions
from pipeline_steps.params import Params
from pipeline_steps.progress import say

if TYPE_CHECKING:
    from pipeline_steps.inbox_known import LeftOut

REPORTS = Path("reports/inbox")
MAX_SLUG = 40  # characters of a delivery's name in its batch's name
N_DIGITS = 10  # of the digest of its content
# Of the system, for names that are too long, or that a file and a folder of an archive share.
BAD_NAMES = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


@dataclass(frozen=True)
class Taken:
    """What became of a delivery.

    Attributes:
        delivery: its name in the inbox.
        outcome: "added", "set aside", "nothing new" (every image was known) or "waiting" (looked at again later).
        batch: the batch's name; None where there is none.
        data_version: of all batches of params.yaml after this, as `versions.data_version` gives it.
        reasons: sentences: why it was set aside or waits, or what is to be told about it.
        report: the page on it, within the project's folder; None where there is none.
    """

    delivery: str
    outcome: Outcome
    batch: str | None
    data_version: str
    reasons: list[str]
    report: Path | None


def take(params: Params, root: Path = Path()) -> list[Taken]:
    """Handles every delivery that is complete, each becoming one batch at most.

    What was done stays in the list of later calls too, until `acknowledge` is called with it: so nobody misses a batch
    whose announcement was cut short.

    Returns:
        What was done, in that order, then what still waits.

    Raises:
        PleatError: another look is at work; `root` is no DVC project; a store, a remote, git or the disk fails. What
            was begun is ended by the next call.
    """
    with _alone(root):
        data_add.clean_up(root)
        for decision in decisions(root):
            if decision.data_version is None:
                _go_on(decision, root)
        inbox = deliveries.open_inbox(params.inbox.source, root)
        waits: list[tuple[str, str]] = []
        for delivery in inbox.look():
            reason = delivery.wait(params.inbox.settle_s) or _handle(delivery, inbox, params, root)
            if reason:
                waits.append((delivery.name, reason))
                say(f"inbox: {delivery.name} waits: {reason}")
        shutil.rmtree(root / STATE / "work", ignore_errors=True)
        done = [_taken(decision) for decision in decisions(root)]
        version = _data_version(root) if waits else ""
        return [*done, *(Taken(name, "waiting", None, version, [reason], None) for name, reason in waits)]


def acknowledge(taken: list[Taken], root: Path = Path()) -> None:
    """Forgets what `take` gave back, once it was announced."""
    told = {(one.delivery, one.batch, one.outcome) for one in taken}
    for decision in decisions(root):
        one = _taken(decision)
        if decision.data_version is not None and (one.delivery, one.batch, one.outcome) in told:
            decision.path(root).unlink(missing_ok=True)


def waiting(params: Params, root: Path = Path()) -> list[Delivery]:
    """What lies in the inbox.

    Raises:
        PleatError: the inbox cannot be read.
    """
    return deliveries.open_inbox(params.inbox.source, root).look()


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Keeps two looks from handling one delivery; the kernel frees it after a kill."""
    data_add.check_project(root)
    path = root / STATE / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(path).acquire(timeout=0)
    except Timeout:
        raise PleatError(
            "Another look at the inbox is at work here; it takes what has arrived.", temporary=True
        ) from None
    except OSError as error:
        raise PleatError(f"Could not write {path}: {error.strerror}; make the project's folder writable.") from error
    with held:
        yield


def _go_on(decision: Decision, root: Path) -> None:
    """Ends what a killed look began; where even the batch was not added, the delivery is looked at anew."""
    if decision.outcome == "added" and not _is_batch(root, decision.batch):
        decision.path(root).unlink()
        return
    say(f"inbox: going on with {decision.delivery} ({decision.outcome})")
    _finish(decision, root)


def _is_batch(root: Path, batch: str) -> bool:
    listed = settings.load(root / "params.yaml").experiment.batches
    return batch in listed and (root / "data" / "raw" / f"{batch}.dvc").is_file()


def _handle(delivery: Delivery, inbox: Inbox, params: Params, root: Path) -> str:
    """Takes one delivery to its end; gives back why it must wait after all, or ""."""
    say(f"inbox: {delivery.name}: {delivery.n_files():,} files, {delivery.n_bytes / 1e6:,.1f} MB")
    work = root / STATE / "work"
    fetched = work / "fetched"
    refused = ""
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        inbox.fetch(delivery, fetched)
    except RefusedError as error:
        refused = str(error)
    except PleatError:
        if not _changed(delivery, inbox):
            raise
        return "It changed while it was copied."
    except OSError as error:
        if error.errno in data_add.DISK_FULL:
            raise PleatError(
                f"No space is left to look at {delivery.name}: {error.strerror}. Free some space; the next look at the "
                "inbox goes on from there.",
                temporary=True,
            ) from error
        if _changed(delivery, inbox):
            return "It changed while it was copied."
        if error.errno in (errno.EACCES, errno.EPERM):
            return f"{error.filename} cannot be read: {error.strerror}."
        if error.errno not in BAD_NAMES:
            raise PleatError(f"{delivery.name} could not be copied: {error}.", temporary=True) from error
        refused = f"It cannot be copied: {error}."
    if _changed(delivery, inbox):
        return "It changed while it was copied."
    decision = _decide(delivery, refused, fetched, params, root)
    decision.write(root)
    if decision.outcome == "added":
        batch = decision.batch
        data_add.add(str(work / "data" / "raw" / batch), batch, params.ingest.format, root)
    _finish(decision, root)
    return ""


def _changed(delivery: Delivery, inbox: Inbox) -> bool:
    return [now.files for now in inbox.look(delivery.name)] != [delivery.files]


def _decide(delivery: Delivery, refused: str, fetched: Path, params: Params, root: Path) -> Decision:
    """Finds out what is to be done, and changes nothing but .pleat and reports/inbox."""
    # Late, since most looks find nothing new.
    from pipeline_steps import inbox_check, inbox_known
    from pipeline_steps.pages import drift as page

    state, work = root / STATE, root / STATE / "work"
    content = {} if refused else inbox_known.contents(fetched)
    # What cannot be read still needs a name, to be set aside under.
    name = batch_name(delivery.name, inbox_known.digest(content) if content else versions.digest(str(delivery.files)))
    decision = Decision(delivery.name, params.inbox.source, delivery.files, "set aside", name, time.time())
    found, left_out, pack = inbox_check.Check(reasons=[refused] if refused else []), None, None
    folder = work / "data" / "raw" / name
    if not refused:
        folder.parent.mkdir(parents=True)
        fetched.rename(folder)
        # A delivery before this one may have become a batch.
        now = settings.load(root / "params.yaml").experiment
        params = params.model_copy(update={"experiment": now})
        known = inbox_known.known_images(params, root, state / "known")
        try:
            left_out = inbox_known.leave_out(folder, params.ingest.format, content, known)
        except PleatError as error:
            found.reasons.append(str(error))
    if left_out and not left_out.n_left and left_out.known:
        n = len(left_out.known)
        return replace(decision, outcome="nothing new", reasons=[f"All of its {n:,} images are in a batch already."])
    if left_out:
        found = inbox_check.check(params, root, work, name, state / "image_statistics.parquet")
        packed = work / "data" / "ingest" / name / "images.arrow"
        pack = packed if packed.is_file() else None
    # The folder is a temporary one; the user knows the delivery.
    found.reasons = [reason.replace(str(folder), delivery.name) for reason in found.reasons]
    report = REPORTS / name / "index.html"
    write_text(root / report, page.drift_page(delivery.name, name, found, left_out, pack))
    notes = _left_out_notes(left_out) if left_out else []
    decision = replace(decision, reasons=[*found.reasons, *notes, *found.notes], report=str(report))
    if found.reasons:
        return decision
    message = f"Add batch {name} from the inbox\n\nDelivery: {delivery.name}\nImages: {len(found.manifest):,}"
    return replace(decision, outcome="added", message=message)


def batch_name(delivery: str, content: str) -> str:
    """The same delivery has the same name on every day: what it is called, and a digest of what it holds."""
    suffix = next((end for end in archives.SUFFIXES if delivery.lower().endswith(end)), "")
    stem = delivery.removesuffix(delivery[len(delivery) - len(suffix) :])
    slug = re.sub(r"[^A-Za-z0-9]+", "_", stem).strip("_")[:MAX_SLUG]
    return "_".join(part for part in ("inbox", slug, content[:N_DIGITS]) if part)


def _left_out_notes(left_out: "LeftOut") -> list[str]:
    notes = []
    if left_out.known:
        notes.append(f"Images left out, since a batch holds them already: {len(left_out.known):,}.")
    if left_out.repeated:
        notes.append(
            f"Images left out, since they came more than once (one of each was kept): {len(left_out.repeated):,}."
        )
    return notes


def _finish(decision: Decision, root: Path) -> None:
    """Does what was decided, from whatever point; each step leaves alone what it has done already."""
    from pipeline_steps import inbox_publish

    notes = {}
    if decision.outcome == "added":
        inbox_publish.push(root, decision.batch)
        inbox_publish.commit(root, decision.batch, decision.message)
    if decision.outcome == "set aside":
        notes["reasons.txt"] = "\n".join(decision.reasons) + "\n"
    if decision.report and (root / decision.report).is_file():
        notes["index.html"] = (root / decision.report).read_text(encoding="utf-8")
    place = SET_ASIDE if decision.outcome == "set aside" else DONE
    inbox = deliveries.open_inbox(decision.source, root)
    inbox.move(decision.delivery, decision.files, place, decision.batch, notes)
    decision = replace(decision, data_version=_data_version(root))
    decision.write(root)
    outcome = f"is now the batch {decision.batch}" if decision.outcome == "added" else f"was {decision.outcome}"
    outcome = "holds nothing new" if decision.outcome == "nothing new" else outcome
    say(f"inbox: {decision.delivery} {outcome}{''.join(f'{chr(10)}  {reason}' for reason in decision.reasons)}")


def _data_version(root: Path) -> str:
    return versions.data_version_of_files(settings.load(root / "params.yaml").experiment.batches, root)


def _taken(decision: Decision) -> Taken:
    batch = decision.batch if decision.outcome == "added" else None
    report = Path(decision.report) if decision.report else None
    version = decision.data_version or ""
    return Taken(decision.delivery, decision.outcome, batch, version, decision.reasons, report)
