"""The page of one delivery: what was found out about it beside the training data."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from pipeline_steps import plots
from pipeline_steps.image_statistics import STATISTICS
from pipeline_steps.inbox_check import Check
from pipeline_steps.inbox_known import LeftOut
from pipeline_steps.packed import read_images
from pipeline_steps.pages import pictures_of, render, thumbnail

N_THUMBNAILS = 12
N_BINS = 32
MAX_LABELS = 60


def drift_page(delivery: str, batch: str, found: Check, left_out: LeftOut | None, pack: Path | None) -> str:
    """The page as HTML.

    Args:
        delivery: its name in the inbox.
        batch: the name that it has or would have as a batch.
        found: the outcome of the check.
        left_out: what was known already; None where it could not be looked for.
        pack: the delivery's images.arrow; None where there is none.
    """
    gallery = []
    if pack is not None and not found.manifest.empty:
        shown = found.manifest.sort_values("sample_id").head(N_THUMBNAILS)
        images = read_images(pack, list(shown["sample_id"]))
        gallery = [
            {
                "thumbnail": thumbnail(images[row["sample_id"]]),
                "label": " / ".join(row[column] for column in found.labels),
                "source_path": row["source_path"],
            }
            for row in shown.to_dict("records")
        ]
    of_images = [distance for distance in found.distances if distance.name in STATISTICS]
    with tempfile.TemporaryDirectory() as folder:
        if len(found.training) and len(found.delivery):
            _histograms(found, Path(folder) / "statistics.png")
        pictures = pictures_of(Path(folder))
    return render(
        "drift.html.j2",
        delivery=delivery,
        batch=batch,
        found=found,
        left_out=left_out,
        labels={column: _label_rows(of_column) for column, of_column in found.labels.items()},
        n_delivered_labels={
            column: int((of_column["delivery"] > 0).sum()) for column, of_column in found.labels.items()
        },
        furthest=max(of_images, key=lambda row: row.distance, default=None),
        n_training=len(found.training),
        gallery=gallery,
        picture=pictures,
        meaning={row.name: STATISTICS.get(row.name, "share of images of each label") for row in found.distances},
    )


def _label_rows(labels: pd.DataFrame) -> list[dict[str, Any]]:
    """Count, share and width of the bar for both sides; the widest bar is the largest share of either."""
    if labels.empty:
        return []
    shares = labels / labels.sum().clip(lower=1)
    widths = (100 * shares / max(shares.to_numpy().max(), 1e-9)).round(1)
    sides = {
        side: [
            {"count": count, "share": share, "width": width}
            for count, share, width in zip(labels[side], shares[side], widths[side], strict=True)
        ]
        for side in ("training", "delivery")
    }
    rows = zip(labels.index, sides["training"], sides["delivery"], strict=True)
    return [{"name": name, "training": before, "delivery": now} for name, before, now in list(rows)[:MAX_LABELS]]


def _histograms(found: Check, path: Path) -> None:
    """A panel for each statistic: shares of the training images as an area, of the delivered ones as a line."""
    broken = {distance.name for distance in found.distances if distance.broken}
    of_name = {distance.name: distance for distance in found.distances}
    with plots.figure(path, 10, 5.4) as figure:
        for number, (name, meaning) in enumerate(STATISTICS.items()):
            axes = figure.add_subplot(2, 3, number + 1)
            both = np.concatenate([found.training[name], found.delivery[name]])
            # One image of 10,000 pixels must not press all others into the first bin.
            low, high = np.quantile(both, [0.002, 0.998])
            low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
            edges = np.linspace(low, high, N_BINS + 1).tolist()
            for values, style in (
                (found.training[name], {"histtype": "stepfilled", "color": plots.PALE, "label": "training data"}),
                (found.delivery[name], {"histtype": "step", "color": plots.BLUE, "lw": 1.6, "label": "delivery"}),
            ):
                clipped = np.clip(values, edges[0], edges[-1])
                axes.hist(clipped, edges, weights=np.full(len(values), 1 / len(values)), **style)
            colour = plots.VERMILLION if name in broken else plots.INK
            axes.set_title(f"{name.replace('_', ' ')}  {of_name[name].distance:.2f}", color=colour)
            axes.set_xlabel(meaning)
            axes.set_yticks([])
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.spines["left"].set_visible(False)
            axes.margins(x=0.02)
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower right", ncols=2)
