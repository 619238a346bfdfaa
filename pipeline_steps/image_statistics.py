"""Simple statistics of images: how bright, contrasty and colourful they are, their shape, size and compression."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from pipeline_steps.files import write_parquet
from pipeline_steps.packed import read_images
from pipeline_steps.progress import track
from pipeline_steps.serving.upright import open_image, upright_rgb

# What each one is, in words and units; they are the columns of every frame here.
STATISTICS = {
    "brightness": "mean luma, 0 to 1",
    "contrast": "standard deviation of luma, 0 to 1",
    "saturation": "mean saturation (HSV), 0 to 1",
    "aspect_ratio": "width by height",
    "shorter_side_px": "shorter side, pixels",
    "bytes_a_pixel": "bytes a pixel of the file",
}
LOOKED_AT_PX = 128  # images are shrunk to this first, so that noise and size have no part in contrast
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
MAX_IMAGES = 2_000
BATCH_OF_READS = 256
VERSION = 1  # of the numbers: what was computed by another one is computed anew


def sample(manifest: pd.DataFrame) -> pd.DataFrame:
    """At most 2,000 rows: those with the lowest sample_id, which is a hash, so that they are as good as drawn."""
    return manifest.sort_values("sample_id", kind="stable").head(MAX_IMAGES).reset_index(drop=True)


def statistics(manifest: pd.DataFrame, packs: dict[str, Path], kept: Path | None = None) -> pd.DataFrame:
    """Computes the statistics of images.

    Args:
        manifest: with sample_id, batch, width, height (upright, pixels) and n_bytes.
        packs: the images.arrow of each batch.
        kept: a Parquet file of what was computed before; images that it has are not decoded again.

    Returns:
        One float column for each of `STATISTICS`, a row for each image, in the order of `manifest`.
    """
    before = _read(kept)
    missing = manifest[~manifest["sample_id"].isin(before.index)]
    found = pd.concat([before, _decoded(missing, packs)]) if len(missing) else before
    pixels = found.loc[manifest["sample_id"]].reset_index(drop=True)
    if kept and len(missing):
        write_parquet(kept, pixels.assign(sample_id=manifest["sample_id"], version=VERSION))
    width, height = manifest["width"].to_numpy(float), manifest["height"].to_numpy(float)
    return pixels.assign(
        aspect_ratio=width / height,
        shorter_side_px=np.minimum(width, height),
        bytes_a_pixel=manifest["n_bytes"].to_numpy(float) / (width * height),
    )


def of_pixels(encoded: bytes) -> tuple[float, float, float]:
    """Brightness, contrast and saturation of one image, each between 0 and 1."""
    with open_image(encoded) as image:
        image.draft("RGB", (LOOKED_AT_PX, LOOKED_AT_PX))  # JPEGs are decoded at a fraction of their size
        small = upright_rgb(image)
    small.thumbnail((LOOKED_AT_PX, LOOKED_AT_PX), Image.Resampling.BOX)
    rgb = np.asarray(small, dtype=np.float64) / 255
    luma, largest = rgb @ LUMA, rgb.max(axis=2)
    saturation = np.divide(largest - rgb.min(axis=2), largest, out=np.zeros_like(largest), where=largest > 0)
    return float(luma.mean()), float(luma.std()), float(saturation.mean())


def _decoded(rows: pd.DataFrame, packs: dict[str, Path]) -> pd.DataFrame:
    found: dict[str, tuple[float, float, float]] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for batch, of_batch in rows.groupby("batch"):
            names = list(of_batch["sample_id"])
            parts = [names[start : start + BATCH_OF_READS] for start in range(0, len(names), BATCH_OF_READS)]
            for part in track(parts, f"image statistics {batch}", len(parts), "parts"):
                images = read_images(packs[str(batch)], part)
                found |= dict(zip(images, pool.map(of_pixels, images.values()), strict=True))
    return pd.DataFrame.from_dict(found, orient="index", columns=["brightness", "contrast", "saturation"], dtype=float)


def _read(kept: Path | None) -> pd.DataFrame:
    if kept and kept.is_file():
        frame = pd.read_parquet(kept)
        if (frame["version"] == VERSION).all():
            return frame.set_index("sample_id")[["brightness", "contrast", "saturation"]]
    return pd.DataFrame(columns=["brightness", "contrast", "saturation"], dtype=float)
