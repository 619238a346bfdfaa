"""How evenly the classes lie in the folds and the holdout: the table and the picture of the split."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pipeline_steps.files import write_csv
from pipeline_steps.targets import Target

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def table(rows: pd.DataFrame, found: Sequence[Target], parts: Mapping[int, str]) -> pd.DataFrame:
    """Samples of each class in each part: one row a target and label (the index), one column a part that has samples.

    Args:
        rows: with `fold` and the columns of the targets.
        found: the targets.
        parts: fold number to name, in the order of the columns.
    """
    tables = {}
    for target in found:
        labels = target.labels(rows).explode()  # a sample of several classes counts in each of them
        counts = pd.crosstab(labels.to_numpy(), rows["fold"][labels.index].to_numpy(), rownames=["label"])
        tables[target.name] = counts[[number for number in parts if number in counts]].rename(columns=parts)
    return pd.concat(tables, names=["target"])


def write(folder: Path, counts: pd.DataFrame, totals: pd.Series) -> None:
    """Writes balance.csv and balance.png; one target's table has no column `target`.

    Args:
        folder: where to.
        counts: as `table` gives it.
        totals: the samples of each part.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {str(name): panel.droplevel("target") for name, panel in counts.groupby("target", sort=False)}
    one = len(panels) == 1
    write_csv(folder / "balance.csv", (counts.droplevel("target") if one else counts).reset_index())

    where = ("lists" if "val" in counts else "folds") + (" and holdout" if "holdout" in counts else "")
    title = f"Samples of each class by {where}; dashed: all classes together"
    heights = [0.34 * len(panel) + 0.3 for panel in panels.values()]
    figure, axes = plt.subplots(
        len(panels), figsize=(10, sum(heights) + 1.2), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for number, (place, (name, panel)) in enumerate(zip(axes[:, 0], panels.items(), strict=True)):
        _bars(place, panel, totals, headed=number == 0)
        if not one:
            place.set_title(name, loc="left", fontweight="bold")
    if one:
        axes[0, 0].set_title(title, pad=12)
    else:
        figure.suptitle(title)
    figure.savefig(folder / "balance.png", dpi=130, metadata={"Software": None})
    plt.close(figure)


def _bars(axes: "Axes", counts: pd.DataFrame, totals: pd.Series, headed: bool) -> None:
    """A bar for each class, the most frequent on top, divided by parts; these are named above where `headed`."""
    counts = counts.loc[counts.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    share = counts.div(counts.sum(axis=1), axis=0)
    left = np.zeros(len(share))
    for number, column in enumerate(share):
        colour = "#d8dee4" if column == "holdout" else ("#9ecae1", "#c6dbef")[number % 2]
        bars = axes.barh(range(len(share)), share[column], left=left, color=colour, edgecolor="white", height=0.82)
        axes.bar_label(bars, [f"{n:,}" for n in counts[column]], label_type="center", fontsize=8, color="#1f2328")
        left += share[column].to_numpy()
    # Where the borders would lie if every class were spread like all samples together.
    overall = totals / totals.sum()
    borders = overall.cumsum()
    for border in borders[:-1]:
        axes.axvline(border, color="#0072b2", linewidth=1, linestyle=(0, (4, 3)))
    if headed:
        top = axes.secondary_xaxis("top")
        top.set_xticks(borders - overall / 2, [f"{name}\n{n:,}" for name, n in totals.items()])
        top.tick_params(length=0)
        top.spines[:].set_visible(False)
    names = [f"{label}  {n:,}" for label, n in counts.sum(axis=1).items()]
    axes.set_yticks(range(len(share)), names, parse_math=False)  # a label may hold a $
    axes.tick_params(length=0)
    axes.set(xlim=(0, 1), xticks=[], ylim=(len(share) - 0.4, -0.6))
    axes.spines[:].set_visible(False)
