"""`pleat predict`: any number of images scored by the champion, one row each, in one Parquet file.

The model answers in a process of its own. That one is started before anything else here is imported: while it imports
torch, this one looks for the images and asks the registry. Rows are written as they come, so memory holds few of them.
"""

import gc
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline_steps import isolated, predict_list, serving
from pipeline_steps.errors import PleatError
from pipeline_steps.params import Params
from pipeline_steps.progress import say, track

TOP_K = 5
ANSWERED_AT_ONCE = 128  # rows that the model's process hands over together
ROWS_A_GROUP = 4096  # of the Parquet file; as many are held in memory


@dataclass(frozen=True)
class Scored:
    """What came of it.

    Attributes:
        version: of the model that answered.
        n_images: rows of the file.
        n_unreadable: rows without an answer.
        seconds: from the call to the finished file.
        answering_s: of these, after the model was loaded.
    """

    version: str
    n_images: int
    n_unreadable: int
    seconds: float
    answering_s: float


def predict(
    params: Params,
    images: Sequence[str],
    out: str,
    version: str | None = None,
    top_k: int = TOP_K,
    listed: str | None = None,
    root: Path = Path(),
) -> Scored:
    """Scores images and writes a row for each, in their order; an image that is given twice has two rows.

    Columns: `path` (as given, or the given folder with what lies below it); for each target, such as `label`: TARGET,
    TARGET_probability and TARGET_top_k (list of {label, probability}, best first); `error` (why an unreadable image
    has none of these, else null); `model_version`. Of a multilabel target, TARGET and TARGET_probability are lists.

    Args:
        params: for the model's name in the registry.
        images: files, folders (with all below them, sorted) or `s3://bucket/prefix`.
        out: a .parquet file, or `s3://bucket/file.parquet`; appears only when it is complete.
        version: the champion where it is None.
        top_k: how many labels TARGET_top_k lists.
        listed: a list of images in `images`, which is then one folder in the format attribute_lists; `out` is a text
            file, written by `predict_list.write`.
        root: the workspace, which relative paths start from.

    Raises:
        PleatError: there is no image, no champion or no such version, the model is broken or does not answer what the
            list asks for, something cannot be reached or written, an image of the list is unreadable (nothing is
            written), or every single image is unreadable (then the file is written all the same).
    """
    if top_k < 1:
        raise PleatError(f"Expected --top-k to be at least 1, but got {top_k}.")
    started, name = time.monotonic(), params.promotion.model
    with (
        tempfile.TemporaryDirectory(prefix="pleat-predict-") as scratch,
        _unless_broken(name),
        isolated.start(serving.CLASSIFIER_REQUIRES) as model,
    ):
        model.prepare_to_classify()
        with _without_collection():
            from pipeline_steps import buckets

            file = _checked(out, root, Path(scratch))
            asked = _asked(images, listed, root) if listed is not None else None
            found = asked.images if asked else _find(images, root, Path(scratch))
            version, folder = _fetch(name, version, Path(scratch))
        say(f"predict: version {version} of {name} scores {len(found):,} images")
        with _unless_broken(f"Version {version} of {name}"):
            targets = model.open(folder)
            loaded = time.monotonic()
            n_unreadable = 0
            if asked:
                asked.check(f"Version {version} of {name}", isolated.classes_of(folder), targets)
                predict_list.write(file, _rows(model, found, 1), asked)
            else:
                n_unreadable = _write(file, _rows(model, found, top_k), targets, version)
            answering_s = time.monotonic() - loaded
        if out.startswith("s3://"):
            buckets.upload(file, out)
    scored = Scored(version, len(found), n_unreadable, time.monotonic() - started, answering_s)
    say(
        f"predict: {len(found):,} images, {n_unreadable:,} of them unreadable, in {scored.seconds:.1f} s; "
        f"{len(found) / scored.seconds:,.0f} images/s in all, {len(found) / answering_s:,.0f} images/s once the model "
        f"was loaded; {out}"
    )
    if n_unreadable == len(found):
        raise PleatError(f"None of the {len(found):,} images can be read; the column `error` of {out} says why.")
    return scored


def _checked(out: str, root: Path, scratch: Path) -> Path:
    """Where the file is written; what is wrong with the place is told before any long work."""
    from pipeline_steps import buckets

    if out.startswith("s3://"):
        buckets.split_object(out)
        return scratch / "out.parquet"
    if (root / out).is_dir():
        raise PleatError(f"{out} is a folder; name a file, such as {Path(out) / 'scores.parquet'}.")
    return root / out


def _find(images: Sequence[str], root: Path, scratch: Path) -> list[tuple[str, Path]]:
    """Every image, as it is named in the output, with its file."""
    from pipeline_steps import buckets
    from pipeline_steps.formats import image_files

    found: list[tuple[str, Path]] = []
    for number, given in enumerate(images):
        folder = root / given
        if given.startswith("s3://"):
            folder = scratch / str(number)
            buckets.download(given, folder)
        if folder.is_dir():
            found += [(f"{given.rstrip('/')}/{inner}", folder / inner) for inner in image_files(folder)]
        elif folder.is_file():
            found.append((_utf8(given), folder))
        else:
            raise PleatError(f"{given} does not exist; name image files, folders or s3://bucket/prefix.")
    if not found:
        raise PleatError(f"No image was found in {', '.join(images)}; files end in .jpg, .png or another usual suffix.")
    return found


def _asked(images: Sequence[str], listed: str, root: Path) -> predict_list.Asked:
    if len(images) > 1 or images[0].startswith("s3://"):
        raise PleatError(f"{listed} lists images of one folder on this machine, but got {', '.join(images)}.")
    return predict_list.find(root / images[0], listed)


def _utf8(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise PleatError(f"The name of {path!r} is not valid UTF-8; rename the file.") from None
    return path


def _fetch(name: str, version: str | None, scratch: Path) -> tuple[str, Path]:
    """The version and the folder of its MLflow model."""
    from pipeline_steps.registry import Registry, reachable

    with reachable():
        registry = Registry(name)
        if version and not registry.exists(version):
            raise PleatError(f"{name} has no version {version}; `pleat history` lists those there are.")
        version = version or registry.champion()
        if not version:
            raise PleatError(
                f"{name} has no champion yet; `dvc repro` trains and registers one, or name a version with --version "
                "(`pleat history` lists them)."
            )
        folder = scratch / "model"
        folder.mkdir()
        return version, registry.download(version, folder)


def _rows(
    model: isolated.Isolated, images: Sequence[tuple[str, Path]], top_k: int
) -> Iterator[tuple[str, isolated.Row]]:
    """The name of each image with its answer, while progress is shown."""
    chunks = model.classify([path for _, path in images], top_k, ANSWERED_AT_ONCE)
    answers = (row for chunk in chunks for row in chunk)
    names = (name for name, _ in images)
    return track(zip(names, answers, strict=True), "predict", len(images), "images")


def _write(out: Path, rows: Iterator[tuple[str, isolated.Row]], targets: Mapping[str, bool], version: str) -> int:
    """Writes the rows as they come; returns how many have no answer. `targets`: whether each is multilabel."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline_steps.files import atomic_path

    ranked = pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float64())]))
    one, several = (pa.string(), pa.float64(), ranked), (pa.list_(pa.string()), pa.list_(pa.float64()), ranked)
    answers = [
        column
        for target, multilabel in targets.items()
        for column in zip(_columns(target), several if multilabel else one, strict=True)
    ]
    schema = pa.schema([("path", pa.string()), *answers, ("error", pa.string()), ("model_version", pa.string())])
    n_unreadable = 0
    with atomic_path(out) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        while part := list(islice(rows, ROWS_A_GROUP)):
            records = [{"path": name, **_record(answer, targets), "model_version": version} for name, answer in part]
            n_unreadable += sum("error" in record for record in records)
            writer.write_table(pa.Table.from_pylist(records, schema))
    return n_unreadable


def _columns(target: str) -> tuple[str, str, str]:
    """As `serving.pyfunc.columns_of`, whose imports would take seconds."""
    return target, f"{target}_probability", f"{target}_top_k"


def _record(answer: isolated.Row, targets: Mapping[str, bool]) -> dict[str, Any]:
    if isinstance(answer, str):
        return {"error": answer}
    record: dict[str, Any] = {}
    for target, best in answer.items():
        labels, ranked = best if targets[target] else (None, best)
        own = ranked[0] if labels is None else ([label for label, _ in labels], [value for _, value in labels])
        listed = [{"label": label, "probability": probability} for label, probability in ranked]
        record |= dict(zip(_columns(target), (*own, listed), strict=True))
    return record


@contextmanager
def _unless_broken(what: str) -> Iterator[None]:
    try:
        yield
    except isolated.BrokenError as error:
        raise PleatError(f"{what} cannot be used: {error}.") from None


@contextmanager
def _without_collection() -> Iterator[None]:
    """For imports, which make many objects and no garbage: looking for it takes a sixth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
