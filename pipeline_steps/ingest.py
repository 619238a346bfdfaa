"""Stage `ingest`: one batch of raw files becomes a manifest, a quarantine and one packed file of images."""

import errno
import hashlib
import os
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import imagehash
import pandas as pd
import pyarrow as pa
from PIL import UnidentifiedImageError

from pipeline_steps import formats
from pipeline_steps.errors import PleatError
from pipeline_steps.files import atomic_folder, write_json, write_parquet
from pipeline_steps.params import Ingest, Params
from pipeline_steps.progress import say, track
from pipeline_steps.serving.upright import FORMATS, is_plain_jpeg, open_image, upright_rgb

QUARANTINE_COLUMNS = ["batch", "source_path", "label", "reason", "detail"]
PACK_SCHEMA = pa.schema([("sample_id", pa.string()), ("bytes", pa.large_binary()), ("plain_jpeg", pa.bool_())])
# The images held in memory at a time: those read ahead, and those not yet written.
READ_AHEAD_A_THREAD = 8
IMAGES_A_CHUNK = 256
BYTES_A_CHUNK = 2**24


@dataclass(frozen=True)
class Sample:
    """What one readable image turned out to be; `phash` is 16 hex digits."""

    sample_id: str
    width: int
    height: int
    n_bytes: int
    phash: str


@dataclass(frozen=True)
class Refusal:
    """Why an image goes to the quarantine."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Packed:
    """One entry of images.arrow."""

    encoded: bytes
    plain_jpeg: bool


def run(params: Params, batch: str, root: Path = Path()) -> None:
    """Writes data/ingest/BATCH: manifest.parquet, quarantine.parquet, images.arrow, counts.json.

    Every row of the batch's labels and every image file ends up either in the manifest or in the quarantine. The
    manifest has one row for each sample: the fields of `Sample`, what `formats.Listing` says of its row, and `batch`.
    The quarantine's `label` joins the labels of all columns by " / ".

    Raises:
        PleatError: the batch is absent or empty, its format is not recognised, a file cannot be read from the disk, or
            not one image is usable.
    """
    folder = root / "data" / "raw" / batch
    if not folder.is_dir():
        raise PleatError(
            f"params.yaml lists the batch '{batch}', but {folder} does not exist. "
            f"Add it with `pleat data add SOURCE --name {batch}`, fetch it with `dvc pull`, or remove it from the list."
        )
    listing = formats.read(folder, params.ingest.format)
    rows = listing.rows.assign(batch=batch)
    rowless = [
        {
            "batch": batch,
            "source_path": path,
            "label": "",
            "reason": "no label",
            "detail": "listed for testing, without labels" if path in listing.test else "no row names this file",
        }
        for path in listing.unlabelled
    ]
    with atomic_folder(root / "data" / "ingest" / batch) as out:
        manifest, refused_rows = _read_all(rows, listing.columns, folder, params.ingest, out / "images.arrow")
        quarantine = pd.DataFrame([*refused_rows, *rowless], columns=QUARANTINE_COLUMNS, dtype="str")
        if manifest.empty:
            raise PleatError(
                f"Not one image of {folder} could be used ({_reasons(quarantine)}); "
                "look at the files, or name another batch in params.yaml."
            )
        write_parquet(out / "manifest.parquet", manifest)
        write_parquet(out / "quarantine.parquet", quarantine)
        counts = {"samples": len(manifest), "quarantine": dict(Counter(quarantine["reason"]))}
        write_json(out / "counts.json", counts)
    say(f"ingest {batch}: {len(manifest):,} images in the manifest, quarantine: {_reasons(quarantine)}")


def _read_all(
    rows: pd.DataFrame, columns: list[str], folder: Path, limits: Ingest, pack: Path
) -> tuple[pd.DataFrame, list[dict[str, str]]]:
    kept: list[dict[str, object]] = []
    refused: list[dict[str, str]] = []
    packed: set[str] = set()
    results = track(_inspect_rows(rows, columns, folder, limits), f"ingest {rows['batch'].iat[0]}", len(rows), "images")
    with pa.OSFile(str(pack), "wb") as sink, pa.ipc.new_file(sink, PACK_SCHEMA) as writer, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # a broken file is refused with its reason
        chunk: list[tuple[str, bytes, bool]] = []
        n_bytes = 0
        for row, (found, image) in zip(cast("list[dict[str, str]]", rows.to_dict("records")), results, strict=True):
            if isinstance(found, Refusal):
                labels = [row[column] for column in columns if row[column].strip()]
                refused.append({**row, "label": " / ".join(labels), **asdict(found)})
                continue
            kept.append({**asdict(found), **row})
            # Exact copies are packed once; `validate` decides which of their rows stays.
            if image is not None and found.sample_id not in packed:
                packed.add(found.sample_id)
                chunk.append((found.sample_id, image.encoded, image.plain_jpeg))
                n_bytes += found.n_bytes
            if len(chunk) == IMAGES_A_CHUNK or n_bytes > BYTES_A_CHUNK:
                writer.write_batch(_record_batch(chunk))
                chunk, n_bytes = [], 0
        if chunk:
            writer.write_batch(_record_batch(chunk))
    return pd.DataFrame(kept), refused


def _record_batch(chunk: list[tuple[str, bytes, bool]]) -> pa.RecordBatch:
    columns = zip(*chunk, strict=True)
    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, PACK_SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=PACK_SCHEMA)


def _inspect_rows(
    rows: pd.DataFrame, columns: list[str], folder: Path, limits: Ingest
) -> Iterator[tuple[Sample | Refusal, Packed | None]]:
    # Threads suffice: Pillow decodes outside the interpreter lock, and Ctrl-C leaves no process behind.
    n_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(n_threads) as pool:
        ahead: deque[Future[tuple[Sample | Refusal, Packed | None]]] = deque()
        for source_path, labels in zip(rows["source_path"], rows[columns].to_dict("records"), strict=True):
            empty = [str(column) for column, label in labels.items() if not label.strip()]
            ahead.append(pool.submit(_inspect, source_path, empty, folder, limits))
            if len(ahead) > READ_AHEAD_A_THREAD * n_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _inspect(
    source_path: str, empty: list[str], folder: Path, limits: Ingest
) -> tuple[Sample | Refusal, Packed | None]:
    if not formats.inside(folder, source_path):
        return Refusal("outside the folder", "the path leads out of the batch's folder"), None
    encoded = _read(folder / source_path)
    if encoded is None:
        return Refusal("missing file", "a row names this file, but it does not exist"), None
    if empty:
        return Refusal("no label", f"empty in the row: {', '.join(empty)}"), None
    if not encoded:
        return Refusal("undecodable", "the file is empty"), None
    try:
        with open_image(encoded) as image:
            width, height = image.size
            if width * height > limits.max_pixels:
                return Refusal("too many pixels", f"{width}x{height} is over ingest.max_pixels"), None
            plain_jpeg = is_plain_jpeg(image)
            upright = upright_rgb(image)
    except MemoryError:
        raise
    except UnidentifiedImageError:  # its own text names an address in memory, different in every run
        return Refusal("undecodable", f"the file is none of {', '.join(FORMATS)}"), None
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        reason = "truncated" if "truncated" in str(error).lower() else "undecodable"
        return Refusal(reason, str(error)[:200]), None
    if min(upright.size) < limits.min_side_px:
        return Refusal("too small", f"{upright.width}x{upright.height} is under ingest.min_side_px"), None
    sample_id = hashlib.sha256(encoded).hexdigest()
    sample = Sample(sample_id, upright.width, upright.height, len(encoded), str(imagehash.phash(upright)))
    return sample, Packed(encoded, plain_jpeg)


def _read(path: Path) -> bytes | None:
    """The file's bytes, or None where there is no such file.

    Raises:
        PleatError: the disk or its permissions fail; going on would leave good images out.
    """
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise PleatError(f"{path} cannot be read: {error.strerror}.") from error


def _reasons(quarantine: pd.DataFrame) -> str:
    counts = Counter(quarantine["reason"])
    return ", ".join(f"{n:,} {reason}" for reason, n in sorted(counts.items())) or "empty"
