"""Leaving out of a delivery what the batches hold already, and what it holds twice itself."""

import csv
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from ruamel.yaml import YAML

from pipeline_steps import formats
from pipeline_steps.data_add import UNFINISHED
from pipeline_steps.errors import PleatError
from pipeline_steps.files import read_json, write_json, write_text
from pipeline_steps.formats.clothing_csv import TABLE
from pipeline_steps.params import Params
from pipeline_steps.progress import say, track


@dataclass(frozen=True)
class Content:
    """What a file's bytes are: `sha256` is the sample_id of manifests, `md5` what DVC records."""

    sha256: str
    md5: str


@dataclass(frozen=True)
class LeftOut:
    """What was removed from a delivery, as paths in it, and how many labelled images are left in it."""

    known: list[str]
    repeated: list[str]
    n_left: int


def contents(folder: Path) -> dict[str, Content]:
    """Hashes every file below `folder`, by its posix path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    hashed = track(map(_content, paths), f"hash {folder.name}", len(paths), "files")
    return {path.relative_to(folder).as_posix(): content for path, content in zip(paths, hashed, strict=True)}


def digest(found: dict[str, Content]) -> str:
    """Names a folder's content: SHA-256 over its files' names and hashes, in hexadecimal digits."""
    text = json.dumps(sorted((name, content.sha256) for name, content in found.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def known_images(params: Params, root: Path, notes: Path) -> set[str]:
    """The MD5 of every file of every batch in data/raw and in params.yaml, whether its files are here or not.

    Args:
        params: for the batches that the experiment uses.
        root: the project's folder.
        notes: where DVC's lists are kept once they were read; they never change, since their names are their hashes.

    Raises:
        PleatError: the experiment uses a batch whose list of files is neither here nor in the remote.
    """
    raw = root / "data" / "raw"
    entries = [path.name for path in raw.iterdir()] if raw.is_dir() else []
    batches = {name.removesuffix(".dvc") for name in entries if not name.startswith((".", UNFINISHED))}
    known: set[str] = set()
    for batch in sorted(batches | set(params.experiment.batches)):
        if (raw / f"{batch}.dvc").is_file():
            try:
                known |= _tracked(root, batch, notes)
            except PleatError:
                if batch in params.experiment.batches:
                    raise
                say(f"The list of files of the batch '{batch}' is nowhere to be found; the experiment does not use it")
        elif (raw / batch).is_dir():
            known |= {content.md5 for content in contents(raw / batch).values()}
    return known


def leave_out(folder: Path, image_format: str, found: dict[str, Content], known: set[str]) -> LeftOut:
    """Removes from `folder` the images whose MD5 is in `known`, and all but one of those with equal bytes and labels.

    Equal bytes under different labels stay, since `validate` quarantines them all and says why.

    Raises:
        PleatError: the folder is no data set of the format, or the labels of the rest would read differently.
    """
    listing = formats.read(folder, image_format)
    labels_of = _labels(listing)
    repeated, gone, seen = [], [], set()
    for path in [path for path in labels_of if path in found] + listing.unlabelled:
        content, labels = found[path], labels_of.get(path)
        if content.md5 in known:
            gone.append(path)
        elif (content, labels) in seen:
            repeated.append(path)
        seen.add((content, labels))
    removed = {*gone, *repeated}
    labelled = {path for path, labels in labels_of.items() if path in found and all(map(str.strip, labels))} - removed
    if removed and labelled:
        _remove(folder, image_format, removed, listing)
        try:
            rest = formats.read(folder, image_format)
        except PleatError:  # such as a list of images that is empty now
            rest = None
        kept = {path: labels for path, labels in labels_of.items() if path not in removed}
        if rest is None or (rest.columns, _labels(rest)) != (listing.columns, kept):
            raise PleatError(
                "Without the images that are known already the labels of the rest would read differently; deliver the "
                "new images in a folder of their own."
            )
    return LeftOut(gone, repeated, len(labelled))


def _labels(listing: formats.Listing) -> dict[str, tuple[str, ...]]:
    """The labels of each row by its path, in the order of `listing.columns`."""
    labels = listing.rows[listing.columns].itertuples(index=False, name=None)
    return dict(zip(listing.rows["source_path"], labels, strict=True))


def _content(path: Path) -> Content:
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            sha256.update(chunk)
            md5.update(chunk)
    return Content(sha256.hexdigest(), md5.hexdigest())


def _tracked(root: Path, batch: str, notes: Path) -> set[str]:
    """The MD5 of each file of a batch that DVC tracks, from its cache, its remote or else the files."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    folder = root / "data" / "raw" / batch
    [recorded] = YAML(typ="safe").load(folder.with_name(f"{batch}.dvc").read_text(encoding="utf-8"))["outs"]
    note = notes / f"{recorded['md5']}.json"
    if not note.is_file():
        try:
            with Repo(str(root)) as repo:
                # Its list alone is fetched where it is not in the cache, none of the images.
                tree = repo.stage.load_one(str(folder.absolute()) + ".dvc").outs[0].get_dir_cache()
        except DvcException as error:
            raise PleatError(f"DVC cannot read data/raw/{batch}.dvc: {error}.") from error
        if tree is not None:
            write_json(note, sorted(content.value for _, _, content in tree))
        elif folder.is_dir():
            return {content.md5 for content in contents(folder).values()}
        else:
            raise PleatError(
                f"Which images the batch '{batch}' holds cannot be found out, neither from DVC's cache nor from a "
                f"remote, so what arrived cannot be compared with them; bring it with `dvc pull data/raw/{batch}.dvc`."
            )
    return set(read_json(note))


def _remove(folder: Path, image_format: str, removed: set[str], before: formats.Listing) -> None:
    for path in removed:
        (folder / path).unlink()
    rows, kept = before.rows, ~before.rows["source_path"].isin(removed)
    image_format = formats.detect(folder) if image_format == "auto" else image_format
    if image_format == "clothing_csv":
        _keep_rows(folder / TABLE, kept)
        # The same image in a less preferred folder has no row of its own any more.
        for path in set(formats.read(folder, image_format).unlabelled) - set(before.unlabelled):
            (folder / path).unlink()
    elif image_format == "attribute_lists":
        for given in rows["given"].unique():
            _keep_lines(folder / "split", given, kept[rows["given"] == given])


def _keep_rows(table: Path, kept: "pd.Series[bool]") -> None:
    """Rewrites images.csv with only the rows that are kept, in the order in which its reader gives them."""
    rows = [row for row in csv.reader(io.StringIO(table.read_text(encoding="utf-8-sig"), newline="")) if row]
    out = io.StringIO(newline="")
    left = [row for row, keep in zip(rows[1:], kept, strict=True) if keep]
    csv.writer(out, lineterminator="\n").writerows([rows[0], *left])
    write_text(table, out.getvalue())


def _keep_lines(split: Path, given: str, kept: "pd.Series[bool]") -> None:
    """Rewrites the list of the train or val images and that of their labels; without one image neither stays."""
    for path in (split / f"{given}.txt", split / f"{given}_attr.txt"):
        header, *lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
        left = [line for line, keep in zip(lines, kept, strict=True) if keep]
        if left:
            write_text(path, "\n".join([header, *left]) + "\n")
        else:
            path.unlink()
