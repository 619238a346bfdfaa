"""The pictures of one model, and the restrained style of all: colour-blind-safe, titled, the same bytes each time.

Nothing here touches pyplot, so there is no global state and no display; pictures are drawn by Agg.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from matplotlib.typing import RcKeyType

from pipeline_steps import metrics
from pipeline_steps.files import atomic_path
from pipeline_steps.metrics import Floats, Ints

DPI = 150
INK, SOFT, PALE = "#1f2328", "#6e7781", "#c9d1d9"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
SERIES = [BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY]  # Okabe & Ito 2008, safe for colour-blind readers
MARKERS = ["o", "s", "^", "D", "v", "P"]
STYLE: dict[RcKeyType, Any] = {
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # ships with matplotlib, so every machine draws the same letters
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a class named "$x_1$" is a name, not a formula
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": PALE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#eaeef2",
    "grid.linewidth": 0.8,
    "xtick.color": PALE,
    "ytick.color": PALE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
}
LABELS = {
    "f1_weighted": "Weighted F1",
    "f1_macro": "Macro F1",
    "accuracy": "Accuracy",
    "roc_auc_macro": "ROC-AUC (macro)",
    "f1_micro": "Micro F1",
    "map_macro": "Mean average precision",
}
MAX_NAME = 30  # characters of a class name that a picture shows
N_HIGHLIGHTED = 5  # curves that are told apart by colour


@contextmanager
def figure(path: Path, width_in: float, height_in: float) -> Iterator[Figure]:
    """Yields an empty figure of the given size in inches; on success writes it to `path` as PNG, atomically."""
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained")
        yield drawing
        with atomic_path(path) as partial:
            drawing.savefig(partial, format="png", dpi=DPI, metadata={"Software": None})


def with_spread(mean: float | None, std: float | None) -> str:
    """`0.786 ± 0.009`; an undefined number is a dash."""
    if mean is None or np.isnan(mean):
        return "—"
    return f"{mean:.3f}" if std is None or np.isnan(std) else f"{mean:.3f} ± {std:.3f}"


def short(name: str) -> str:
    """A name that fits into a picture; a long one loses its middle, as names often differ at one of their ends."""
    name = " ".join(name.split())
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME // 2]}…{name[-MAX_NAME // 2 + 1 :]}"


def log_ticks(axis: Axis, told: Callable[[float], str]) -> None:
    """Few round values on a log axis, written as `told` writes them; its limits are set before."""
    low, high = sorted(axis.get_view_interval())
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(ticks) <= 9:
            break
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: told(value)))


def confusion(path: Path, counts: Ints, classes: Sequence[str]) -> None:
    """Confusion matrix: colour is the share of the actual class, the number is the count (c, c)."""
    size = len(classes)
    cell_in = float(np.clip(9 / size, 0.22, 0.55))
    tick_pt = min(9.0, cell_in * 72 * 0.42)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [short(name) for name in classes]
    longest_in = max(map(len, names)) * tick_pt * 0.6 / 72
    side_in = size * cell_in + longest_in
    with figure(path, max(5.0, side_in + 1.5), max(3.6, side_in + 1.0)) as drawing:
        axes = drawing.add_subplot()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_title("Actual class against prediction", loc="left")
        axes.set_xlabel("predicted")
        axes.set_ylabel("actual")
        axes.set_xticks(range(size), names, rotation=90 if size > 4 or longest_in > cell_in else 0, fontsize=tick_pt)
        axes.set_yticks(range(size), names, fontsize=tick_pt)
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        digits = len(str(counts.max()))
        for row, column in zip(*np.nonzero(counts), strict=True):
            axes.text(
                column, row, f"{counts[row, column]}", ha="center", va="center",
                fontsize=min(9.0, cell_in * 72 * 0.85 / max(digits, 2) / 0.64),
                color="white" if shares[row, column] > 0.65 else INK,
            )  # fmt: skip
        bar = drawing.colorbar(
            image, ax=axes, shrink=min(1.0, 4 / (size * cell_in)), aspect=18, fraction=0.05, pad=0.02
        )
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1))
        bar.set_label("share of the actual class")
        bar.outline.set_visible(False)


def per_class(path: Path, classes: pd.DataFrame, n_folds: int) -> None:
    """F1 of each class with its interval, beside precision and recall; the weakest class is at the bottom."""
    with_interval, mean = (", with 95% interval over folds", ", mean over folds") if n_folds > 1 else ("", "")
    table = classes.sort_values(["f1_mean", "class"], ascending=[True, False], na_position="first")
    height = np.arange(len(table))
    with figure(path, 8.2, 1.5 + 0.27 * len(table)) as drawing:
        axes = drawing.add_subplot()
        axes.hlines(height, table["f1_ci95_low"], table["f1_ci95_high"], color=BLUE, lw=5, alpha=0.25)
        for name, marker, colour, label in (
            ("precision", "|", VERMILLION, "precision"),
            ("recall", "x", GREEN, "recall"),
            ("f1", "o", BLUE, f"F1{with_interval}"),
        ):
            axes.scatter(table[f"{name}_mean"], height, marker=marker, color=colour, label=label, s=36, zorder=3)
        support = zip(table["class"], table["support"], strict=True)
        axes.set_yticks(height, [f"{short(name)}  ({count:,})" for name, count in support])
        axes.set_ylim(-0.7, len(table) - 0.3)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel(f"score{mean} (samples of the class in brackets)")
        axes.set_title("Scores of each class", loc="left")
        drawing.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=3)


def roc(path: Path, classes: pd.DataFrame, folds: Sequence[tuple[Ints, Any]]) -> None:
    """Left the mean ROC curve over folds of each class against the rest, right each class's area.

    Args:
        path: the PNG to write.
        classes: the per-class table, rows in the order of the class numbers.
        folds: for each fold what is actual, (n,) or (n, c), and the probabilities (n, c).
    """
    mean, spread = (", mean over folds", ", mean ± standard deviation over folds") if len(folds) > 1 else ("", "")
    grid = np.linspace(0, 1, 201)
    false_rates = np.append(0, grid)  # every curve begins at (0, 0), most of them with a vertical step
    table = classes.sort_values(["roc_auc_mean", "class"], ascending=[True, False], na_position="first")
    colour = weakest_in_colour(table, "roc_auc_mean")
    curves = {number: curve for number in table.index if (curve := _mean_curve(folds, int(number), grid)) is not None}
    with figure(path, 10.2, max(4.9, 1.3 + 0.24 * len(table))) as drawing:
        left, right = drawing.subplots(1, 2, width_ratios=[1.15, 1])
        left.plot([0, 1], [0, 1], color=PALE, lw=1, ls=(0, (4, 3)))
        for number, curve in curves.items():
            width, order = (1.6, 3) if number in colour else (1.0, 2)
            left.plot(false_rates, np.append(0, curve), color=colour.get(number, PALE), lw=width, zorder=order)
        if curves:
            left.plot(false_rates, np.append(0, np.mean(list(curves.values()), axis=0)), color=INK, lw=2.2, zorder=4)
            left.text(0.97, 0.04, "black: mean of all classes\ncoloured: as on the right", ha="right", color=SOFT)
        left.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal", anchor="N")
        left.set(xlabel="false positive rate", ylabel="true positive rate")
        left.set_title(f"ROC, one class against the rest{mean}", loc="left")
        scores_by_class(right, table, "roc_auc", colour)
        right.set_xlim(right=min(right.get_xlim()[1], 1.005))
        right.set_xlabel(f"ROC-AUC{spread}")
        right.set_title("Area under the curve", loc="left")


def weakest_in_colour(table: pd.DataFrame, score: str) -> dict[int, str]:
    """A colour for each of the weakest classes of a table that is sorted by `score`, by the table's index."""
    weakest = table.index[table[score].notna().to_numpy()][:N_HIGHLIGHTED]
    return {int(number): SERIES[place] for place, number in enumerate(weakest)}


def scores_by_class(axes: Axes, table: pd.DataFrame, name: str, colour: Mapping[int, str]) -> None:
    """A dot a class with its standard deviation; the table's first row is at the bottom, `colour` is by its index."""
    height = np.arange(len(table))
    colours = [colour.get(number, SOFT) for number in table.index]
    means, stds = table[f"{name}_mean"], table[f"{name}_std"]
    axes.errorbar(means, height, xerr=stds, fmt="none", ecolor=colours, elinewidth=1.2)
    axes.scatter(means, height, color=colours, s=24, zorder=3)
    axes.set_yticks(height, [short(name) for name in table["class"]])
    axes.set_ylim(-0.7, len(table) - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _mean_curve(folds: Sequence[tuple[Ints, Any]], number: int, grid: Floats) -> Floats | None:
    defined = []
    for actual, probability in folds:
        positive = metrics.indicator(actual, probability.shape[1])[:, number]
        if 0 < positive.sum() < len(positive):
            defined.append((positive, probability[:, number]))
    return metrics.mean_roc_curve(defined, grid) if defined else None


def curves(path: Path, history: pd.DataFrame, best_epochs: Mapping[int, int]) -> None:
    """Loss, accuracy and inner weighted F1 over the epochs, a line a fold, a dot where the kept weights are from."""
    parts = {"train": (BLUE, "training part"), "inner": (VERMILLION, "inner part (chooses the epoch)")}
    panels = {
        "loss": ("Loss", "loss"),
        "accuracy": ("Accuracy", "accuracy"),
        "f1_weighted": ("Weighted F1", "weighted F1"),
    }
    with figure(path, 10.2, 3.7) as drawing:
        for axes, (score, (title, unit)) in zip(drawing.subplots(1, 3), panels.items(), strict=True):
            for part, (colour, _) in parts.items():
                if f"{part}_{score}" not in history:
                    continue
                for fold, best_epoch in best_epochs.items():
                    rows = history[history["fold"] == fold]
                    axes.plot(rows["epoch"], rows[f"{part}_{score}"], color=colour, lw=1, alpha=0.8)
                    if part == "inner":
                        best = rows[rows["epoch"] == best_epoch]
                        axes.plot(best["epoch"], best[f"{part}_{score}"], "o", color=INK, ms=4, zorder=3)
            axes.set_title(title, loc="left")
            axes.set(xlabel="epoch", ylabel=unit)
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
            if score == "loss":
                axes.set_ylim(bottom=0)
        lines = [Line2D([], [], color=colour, label=label) for colour, label in parts.values()]
        dot = Line2D([], [], color=INK, marker="o", ls="", ms=4, label="epoch kept; one line a fold")
        drawing.legend(handles=[*lines, dot], loc="outside lower right", ncols=3)


def folds(path: Path, table: pd.DataFrame, summary: Mapping[str, Any]) -> None:
    """The scores of each fold, their mean and 95% interval; which scores, the table's columns say."""
    names = [name for name in reversed(LABELS) if name in table]
    with figure(path, 8.2, 1.3 + 0.4 * len(names)) as drawing:
        axes = drawing.add_subplot()
        for height, name in enumerate(names):
            one = summary[name]
            scores = table[name].to_numpy(dtype=float)
            axes.scatter(scores, np.full(len(scores), height), facecolor="none", edgecolor=SOFT, s=34, zorder=3)
            if one["ci95_low"] is not None:
                axes.hlines(height, one["ci95_low"], one["ci95_high"], color=BLUE, lw=7, alpha=0.25)
            if one["mean"] is not None:
                axes.plot(one["mean"], height, "|", color=BLUE, ms=17, mew=2.5, zorder=4)
            text = with_spread(one["mean"], one["std"])
            axes.annotate(text, (1.01, height), xycoords=("axes fraction", "data"), va="center")
        axes.set_yticks(range(len(names)), [LABELS[name] for name in names])
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlabel("score; circles: folds, bar: mean, band: 95% interval, right: mean ± standard deviation")
        axes.set_title("Scores of each fold", loc="left")
