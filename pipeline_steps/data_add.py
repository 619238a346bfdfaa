"""`pleat data add`: a data set becomes a batch, completely or not at all."""

import errno
import fcntl
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pandas as pd
from ruamel.yaml import YAML

from pipeline_steps import formats, params, sources
from pipeline_steps.buckets import redact
from pipeline_steps.errors import PleatError
from pipeline_steps.files import atomic_path
from pipeline_steps.formats import Listing
from pipeline_steps.params import Params
from pipeline_steps.progress import say

# data/raw/.adding-NAME exists exactly while NAME is being added, so an add that was killed is recognised by it.
UNFINISHED = ".adding-"
MOVING = "moving"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def add(source: str, name: str, image_format: str = "auto", root: Path = Path()) -> None:
    """Brings `source` into data/raw/NAME, tracks it with DVC and lists it in params.yaml.

    On any failure, on Ctrl-C, and after a kill at the next call, nothing of it is left behind (except contents in DVC's
    cache, which `dvc gc` removes).

    Args:
        source: a folder, an archive, a git address, or s3://bucket/prefix.
        name: the batch's name, which must be new.
        image_format: "auto" or a name in `formats.READERS`.
        root: the project's folder.

    Raises:
        PleatError: the name is taken or unusable, the source cannot be read, or it is no data set of the format.
    """
    _check_name(name)
    settings = params.load(root / "params.yaml")
    sources.kind_of(source)
    target = root / "data" / "raw" / name
    with _alone(root) as lock:
        _undo_killed(root)
        _check_free(target)
        # Found out now rather than after an hour's download.
        _listed(root / "params.yaml", name)
        staging = target.with_name(f"{UNFINISHED}{name}")
        try:
            staging.mkdir(parents=True)
            used, listing, complete = _bring(source, staging / name, image_format)
            (staging / MOVING).touch()
            (staging / name).rename(target)
            say(f"dvc add {target}")
            # The child holds the lock too: were this process killed, nobody would clean up under a dvc still at work.
            command = [sys.executable, "-m", "dvc", "add", f"data/raw/{name}"]
            sources.run_child(command, cwd=root, inherit=[lock.fileno()])
            with atomic_path(root / "params.yaml") as partial:
                partial.write_bytes(_listed(root / "params.yaml", name))
            shutil.rmtree(staging)
        except BaseException as error:
            _undo(root, staging)
            if isinstance(error, OSError):
                raise _sentence(error, source, target) from error
            raise
    _report(settings, target, used, listing, complete)


def clean_up(root: Path) -> None:
    """Takes back, or ends, an `add` that was killed, as the next one would.

    Raises:
        PleatError: another `add` is at work, or `root` is no DVC project.
    """
    if any((root / "data" / "raw").glob(f"{UNFINISHED}*")):
        with _alone(root):
            _undo_killed(root)


def check_project(root: Path) -> None:
    """Passes where DVC keeps its things.

    Raises:
        PleatError: it does not.
    """
    if not (root / ".dvc").is_dir():
        raise PleatError(
            f"{root.absolute()} is no DVC project (it has no .dvc folder); change to the project's folder."
        )


def _check_name(name: str) -> None:
    if not re.fullmatch(params.NAME, name) or len(name) > 80 or name.endswith(".dvc"):
        raise PleatError(
            f"Expected --name to be letters, digits, '_' and '.', at most 80, beginning with a letter or digit and not "
            f"ending in .dvc, but got '{name}'."
        )
    if name == "sample":
        raise PleatError("The name 'sample' is reserved for the images that come with Pleat; choose another --name.")


def _check_free(target: Path) -> None:
    if target.with_name(f"{target.name}.dvc").exists() and not target.exists():
        raise PleatError(f"The batch '{target.name}' exists already ({target}.dvc); fetch it with `dvc pull`.")
    if target.exists() or target.is_symlink():
        raise PleatError(
            f"{target} exists already, and a batch is never changed; choose another --name for new data, or remove it."
        )


@contextmanager
def _alone(root: Path) -> Iterator[IO[bytes]]:
    """Keeps two adds from changing params.yaml and data/raw/.gitignore at once; the kernel frees it after a kill."""
    check_project(root)
    path = root / ".dvc" / "tmp" / "pleat-data-add.lock"
    try:
        path.parent.mkdir(exist_ok=True)
        lock = path.open("wb")
    except OSError as error:
        raise PleatError(f"Could not write {path}: {error.strerror}; make the project's folder writable.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PleatError(
                "Another `pleat data add`, or the `dvc add` of a killed one, is at work here; wait until it is done."
            ) from None
        try:
            yield lock
        finally:
            # Closing is not enough: dvc's background process for updates may still hold a copy.
            fcntl.flock(lock, fcntl.LOCK_UN)


def _bring(source: str, folder: Path, image_format: str) -> tuple[str, Listing, pd.DataFrame]:
    """Fills `folder` and gives back its format, its listing, and the rows that have both a label and an image."""
    sources.bring(source, folder)
    try:
        used = formats.detect(folder) if image_format == "auto" else image_format
        listing = formats.read(folder, used)
    except PleatError as error:
        # The folder is a temporary one; the user knows the source.
        raise PleatError(str(error).replace(str(folder), redact(source))) from None
    rows = listing.rows
    has_image = rows["source_path"].isin(formats.image_files(folder))
    has_labels = rows[listing.columns].apply(lambda labels: labels.str.strip() != "").all(axis=1)
    complete = rows[has_image & has_labels]
    if complete.empty:
        raise PleatError(
            f"{redact(source)} has {len(rows):,} rows of labels and {len(listing.unlabelled):,} other images, but no "
            f"image with a label; an image was expected as {rows['source_path'].iat[0]!r}, for instance."
        )
    return used, listing, complete


def _listed(path: Path, name: str) -> bytes:
    """The text of params.yaml with `name` at the end of experiment.batches and not one other character changed.

    Raises:
        PleatError: the file is not valid, or its list is written in a way (an alias, say) that cannot be added to.
    """
    params.load(path)
    text = path.read_bytes().decode("utf-8")
    before = YAML(typ="safe").load(text)
    batches = before["experiment"]["batches"]
    if name in batches:
        return text.encode()
    blocks = {key.value: value for key, value in YAML(typ="safe", pure=True).compose(text).value}
    node = {key.value: value for key, value in blocks["experiment"].value}["batches"]
    last = node.value[-1].end_mark.index
    entry = name if YAML(typ="safe").load(name) == name else f'"{name}"'
    if node.flow_style:
        before_comment = re.match(r"(\s*\])( +)#", text[last:])
        rest = text[last:]
        if before_comment:
            # Comments that stand below each other stay so, where there is room.
            spare = max(0, min(len(before_comment[2]) - 2, len(entry) + 2))
            rest = before_comment[1] + rest[before_comment.start(2) + spare :]
        text = f"{text[:last]}, {entry}{rest}"
    else:
        line, newline, below = text[last:].partition("\n")
        cr = "\r" if line.endswith("\r") else ""
        indent = " " * node.start_mark.column
        text = f"{text[:last]}{line}{newline or chr(10)}{indent}- {entry}{cr}{newline}{below}"
    before["experiment"]["batches"] = [*batches, name]
    if YAML(typ="safe").load(text) != before:
        raise PleatError(f"{path}: write experiment.batches as a plain list such as [sample]; pleat must add to it.")
    return text.encode()


def _undo_killed(root: Path) -> None:
    for leftover in (root / "data" / "raw").glob(f"{UNFINISHED}*"):
        say(f"Removing what an add of '{leftover.name.removeprefix(UNFINISHED)}' left that was killed")
        _undo(root, leftover)


def _undo(root: Path, staging: Path) -> None:
    """Removes every trace of an unfinished add; the staging folder last, so that a kill in here is made good too."""
    name = staging.name.removeprefix(UNFINISHED)
    target = staging.with_name(name)
    tracked = target.with_name(f"{name}.dvc")
    moved = (staging / MOVING).exists() and not (staging / name).exists()
    try:
        finished = tracked.exists() and name in params.load(root / "params.yaml").experiment.batches
    except PleatError:
        finished = False
    try:
        if moved and not finished:
            _forget(target.with_name(".gitignore"), f"/{name}")
            tracked.unlink(missing_ok=True)
            if target.exists():
                shutil.rmtree(target)
        if staging.exists():
            shutil.rmtree(staging)
    except OSError as error:
        say(f"Could not remove {error.filename}: {error.strerror}; the next `pleat data add` tries again.")


def _forget(gitignore: Path, line: str) -> None:
    if not gitignore.exists():
        return
    lines = gitignore.read_text(encoding="utf-8").splitlines()
    kept = [other for other in lines if other != line]
    if not kept:
        gitignore.unlink()
    elif kept != lines:
        with atomic_path(gitignore) as partial:
            partial.write_text("\n".join(kept) + "\n", encoding="utf-8")


def _sentence(error: OSError, source: str, target: Path) -> PleatError:
    if error.errno in DISK_FULL:
        return PleatError(
            f"No space is left for {redact(source)} in {target.parent}: {error.strerror}. "
            "Free some space and add it again; nothing was left behind."
        )
    where = f" ({error.filename})" if error.filename else ""
    return PleatError(
        f"Could not bring {redact(source)} to {target}: {error.strerror or error}{where}. Nothing was left behind."
    )


def _report(settings: Params, target: Path, used: str, listing: Listing, complete: pd.DataFrame) -> None:
    name = target.name
    classes = ", ".join(f"{complete[column].nunique():,} of {column}" for column in listing.columns)
    say(f"{target}: {len(complete):,} labelled images, classes: {classes} ({used})")
    n_incomplete = len(listing.rows) - len(complete)
    if n_incomplete:
        say(f"  {n_incomplete:,} rows have no image or no label; ingest puts them into the quarantine")
    if listing.unlabelled:
        say(f"  {len(listing.unlabelled):,} images have no row; ingest puts them into the quarantine")
    later = formats.detect(target) if settings.ingest.format == "auto" else settings.ingest.format
    if later != used:
        say(f"  Note: the pipeline would read it as {later}; set `ingest.format: {used}` in params.yaml")
    others = [batch for batch in settings.experiment.batches if batch != name]
    if others:
        alone = f"pleat use {settings.experiment.recipe} --set 'experiment.batches=[{name}]'"
        say(f"The experiment now uses {', '.join([*others, name])}; for {name} alone: `{alone}`")
    changed = [target.with_name(f"{name}.dvc"), target.with_name(".gitignore"), target.parents[2] / "params.yaml"]
    say(f"Next: `git add {' '.join(str(path) for path in changed if path.exists())}`, then `dvc repro`")
