"""Stage `prepare`: what a model trains on, once for all folds: frozen features or uint8 pixels of one batch."""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline_steps.errors import PleatError
from pipeline_steps.files import atomic_folder, write_json
from pipeline_steps.params import Params
from pipeline_steps.params_models import CustomCnn, FinetunedModel, FrozenModel, ScratchModel
from pipeline_steps.progress import say, track

if TYPE_CHECKING:
    from torch import Tensor

IMAGES_A_CHUNK = 256


def run(params: Params, model: str, batch: str, root: Path = Path(), to: Path | None = None) -> None:
    """Writes data/prepare/MODEL/BATCH: inputs.npy, sample_ids.json and inputs.json.

    inputs.npy is float32 (n, 2, n_features) for a frozen backbone, plain and mirrored view; uint8 (n, 3, size, size)
    for a network that is trained on pixels. Row i belongs to sample_ids[i].

    Args:
        to: the folder that data/prepare lies in; None: `root`.

    Raises:
        PleatError: timm does not know the network, its weights cannot be had or do not fit, it cannot take images of
            this size, or the batch was not ingested.
    """
    settings = params.models[model]
    pack = root / "data" / "ingest" / batch / "images.arrow"
    if not pack.is_file():
        raise PleatError(f"{pack} is missing: the stage ingest has not run; run `dvc repro`.")
    title, place = f"prepare {model} on {batch}", (to or root) / "data" / "prepare" / model / batch
    with pa.memory_map(str(pack)) as source, atomic_folder(place) as out, ExitStack() as leased:
        table = pa.ipc.open_file(source).read_all()
        ids = table["sample_id"].to_pylist()
        images = ((row["bytes"], row["plain_jpeg"]) for row in _rows(table))
        if isinstance(settings, FrozenModel):
            rows, about = _features(settings, images, root, title, leased)
        else:
            rows, about = _pixels(settings, images, root)
        shape = _write(out / "inputs.npy", track(rows, title, len(ids), "images"), len(ids))
        about |= {"shape": list(shape), "sha256": sha256(out / "inputs.npy")}
        write_json(out / "sample_ids.json", ids)
        write_json(out / "inputs.json", about)
    say(f"{title}: {about['kind']} of {len(ids):,} images, shape {shape}")


def _rows(table: pa.Table) -> Iterator[dict]:
    for part in table.to_batches(max_chunksize=IMAGES_A_CHUNK):
        yield from part.to_pylist()


def _features(
    settings: FrozenModel, images: Iterator[tuple[bytes, bool]], root: Path, purpose: str, leased: ExitStack
) -> tuple[Iterator[np.ndarray], dict]:
    from pipeline_steps.vision.backbones import extract, load_backbone
    from pipeline_steps.vision.lease import lease

    weights = root / settings.weights if settings.weights else None
    backbone, preprocessing = load_backbone(
        settings.backbone, weights, settings.head_on, settings.input_size, settings.crop_pct
    )
    about = {"kind": "features", "weights_sha256": sha256(weights) if weights else "from timm's hub"}
    leased.enter_context(lease(purpose))  # until all rows are written; a leased GPU is torch's current device
    return extract(backbone, preprocessing, images), about


def _pixels(
    settings: FinetunedModel | ScratchModel | CustomCnn, images: Iterator[tuple[bytes, bool]], root: Path
) -> tuple[Iterator[np.ndarray], dict]:
    from pipeline_steps.serving.images import decode, resize_crop

    if isinstance(settings, CustomCnn):
        size = settings.input_size
        return _each(images, lambda image: resize_crop(decode(*image), size, size)), {"kind": "pixels"}
    from pipeline_steps.vision.timm_networks import create, n_features, preprocessing

    about, name, wanted = {"kind": "pixels"}, settings.backbone, settings.input_size
    # What training would refuse is refused here, before any long work.
    n_features(name, wanted, settings.head_on if isinstance(settings, FinetunedModel) else "pooled")
    if isinstance(settings, FinetunedModel):
        weights = root / settings.weights if settings.weights else None
        create(name, weights, pretrained=True, input_size=wanted, head_on=settings.head_on)
        about["weights_sha256"] = sha256(weights) if weights else "from timm's hub"
    return _each(images, preprocessing(name, wanted, settings.crop_pct)), about


def _each(
    images: Iterator[tuple[bytes, bool]], prepared: "Callable[[tuple[bytes, bool]], Tensor]"
) -> Iterator[np.ndarray]:
    import torch

    torch.set_num_threads(1)  # parallel over images instead
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(images, IMAGES_A_CHUNK)):
            yield from pool.map(lambda image: prepared(image).numpy(), chunk)


def _write(path: Path, rows: Iterator[np.ndarray], n_rows: int) -> tuple[int, ...]:
    """Streams the rows into a .npy file, so that memory does not grow with the data.

    Written, not memory-mapped: a full disk is then an error to report, not a killed process.
    """
    shape: tuple[int, ...] = (n_rows,)
    with path.open("wb") as file:
        for row in rows:
            if len(shape) == 1:
                shape = (n_rows, *row.shape)
                header = {"descr": np.lib.format.dtype_to_descr(row.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(row).data)
    return shape


def sha256(path: Path) -> str:
    """Names the contents of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
