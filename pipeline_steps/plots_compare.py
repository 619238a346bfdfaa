"""Pictures that set models side by side; style and helpers are those of plots.py."""

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.path import Path as MplPath
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from pipeline_steps.metrics import Floats
from pipeline_steps.plots import BLUE, MARKERS, PALE, SERIES, SOFT, figure, log_ticks, short
from pipeline_steps.units import with_unit

LABEL_DISTANCES_PX = (14, 27, 42, 60, 80, 102, 126, 152, 180, 210)
LABEL_DIRECTIONS = [  # the preferred first: right, left, above, below, then between
    np.array([np.cos(angle), np.sin(angle)])
    for angle in np.radians([0, 180, 90, 270, 35, 145, 325, 215, 65, 115, 295, 245])
]
MARKER_PX = 11.0  # half the side of the box that a dot fills
CROSSING_PX2 = 900.0  # a leader across a name is as bad as names that overlap by this area
HALO = [withStroke(linewidth=2.5, foreground="white")]


def pareto_front(macs: Sequence[float], score: Sequence[float]) -> list[int]:
    """Places of the models that no other one beats in cost and score at once, from cheap to dear."""
    front: list[int] = []
    for place in sorted(range(len(macs)), key=lambda place: (macs[place], -score[place], place)):
        if not front or score[place] > score[front[-1]]:
            front.append(place)
    return front


def quality_against_macs(path: Path, board: pd.DataFrame, n_targets: int) -> None:
    """Weighted F1 with its interval over MACs on a log axis; the Pareto front is the line.

    Args:
        path: the PNG to write.
        board: the leaderboard; columns model, f1_weighted, f1_weighted_ci95_low, f1_weighted_ci95_high, macs.
        n_targets: over which the scores are means.
    """
    macs = board["macs"].to_numpy(dtype=float).clip(min=1)
    score = board["f1_weighted"].to_numpy(dtype=float)
    front = pareto_front(list(macs), list(score))
    with figure(path, 8.6, 5.0) as drawing:
        axes = drawing.add_subplot(xscale="log")
        low, high = macs.min() / 3, macs.max() * 3
        axes.set_xlim(low, high)
        log_ticks(axes.xaxis, with_unit)
        axes.step(macs[front], score[front], where="post", color=PALE, lw=1.5, zorder=1)
        below, above = score - board["f1_weighted_ci95_low"], board["f1_weighted_ci95_high"] - score
        # An interval that the folds do not define is drawn as none at all.
        error = np.nan_to_num(np.array([below, above], dtype=float)).clip(min=0)
        axes.errorbar(macs, score, yerr=error, fmt="none", ecolor=SOFT, elinewidth=1.2, capsize=3, zorder=2)
        on_front = np.isin(np.arange(len(board)), front)
        axes.scatter(macs[on_front], score[on_front], s=54, color=BLUE, zorder=3)
        axes.scatter(macs[~on_front], score[~on_front], s=54, facecolor="white", edgecolor=BLUE, zorder=3)
        axes.margins(y=0.14)
        axes.set_xlabel("multiply-accumulates of one image (MACs, log scale)")
        spread = ", mean and 95% interval over folds" if board["f1_weighted_ci95_low"].notna().any() else ""
        axes.set_ylabel(f"weighted F1{_of_targets(n_targets)}{spread}")
        axes.set_title("Quality against cost; line and filled dots: Pareto front", loc="left")
        drawing.draw_without_rendering()
        label_points(axes, macs, score, error, front, [short(name) for name in board["model"]])


def label_points(axes: Axes, x: Floats, y: Floats, error: Floats, front: Sequence[int], names: Sequence[str]) -> None:
    """Puts each name at a free place near its point, with a thin line where it had to move away.

    Args:
        axes: drawn before, so that places in pixels are known.
        x: of the n points.
        y: of the n points.
        error: of y, below and above (2, n).
        front: places of the points that a stepped line joins, which names should not cover; may be empty.
        names: of the n points.
    """
    to_pixels = axes.transData.transform
    points = to_pixels(np.column_stack([x, y]))
    ends = np.hstack([to_pixels(np.column_stack([x, y - error[0]])), to_pixels(np.column_stack([x, y + error[1]]))])
    bars = [Bbox([[left - 9, bottom - 3], [left + 9, top + 3]]) for left, bottom, _, top in ends]
    steps = [corner for one, two in pairwise(front) for corner in ((x[one], y[one]), (x[two], y[one]))]
    lines: list[Bbox] = []
    if front:
        corners = to_pixels([*steps, (x[front[-1]], y[front[-1]])])
        lines = [Bbox([np.minimum(one, two) - 1, np.maximum(one, two) + 1]) for one, two in pairwise(corners)]
    sizes: list[Floats] = []
    for name in names:
        probe = axes.text(x[0], y[0], name)
        sizes.append(np.array(probe.get_window_extent().size))
        probe.remove()
    offsets = free_places(points, np.array(sizes), [*bars, *lines], axes.get_window_extent())
    for place, name in enumerate(names):
        right, up = offsets[place]
        gap = np.hypot(*np.maximum(np.abs(offsets[place]) - sizes[place] / 2, 0))
        leader = {"arrowstyle": "-", "color": SOFT, "lw": 0.7, "shrinkA": 1, "shrinkB": 5}
        label = axes.annotate(
            name, (x[place], y[place]), xytext=(right, up), textcoords="offset pixels", ha="center", va="center",
            path_effects=HALO, zorder=5, arrowprops=leader if gap > 1.5 * LABEL_DISTANCES_PX[0] else None,
        )  # fmt: skip
        label.set_in_layout(False)  # else the axes would shrink to make room and every place would be off


def free_places(points: Floats, sizes: Floats, taken: Sequence[Bbox], inside: Bbox) -> list[Floats]:
    """Where labels can stand so that they cover nothing, each as near to its point as it gets; all in pixels.

    Args:
        points: the labelled points, shape (n, 2).
        sizes: width and height of each label, shape (n, 2).
        taken: boxes that labels should not cover.
        inside: the box that labels should not leave.

    Returns:
        For each label the offset of its middle from its point, shape (2,).
    """
    markers = [Bbox([point - MARKER_PX, point + MARKER_PX]) for point in points]
    labels: list[Bbox] = []
    leaders: list[MplPath] = []
    offsets: list[Floats] = []
    for place, (point, size) in enumerate(zip(points, sizes, strict=True)):
        others = [*markers[:place], *markers[place + 1 :], *labels]
        best: tuple[float, Floats, Bbox, MplPath] | None = None
        for distance, towards in product(LABEL_DISTANCES_PX, LABEL_DIRECTIONS):
            # The label's edge, not its middle, keeps the distance to the point.
            offset = towards * distance + towards * np.abs(towards) * size / 2
            box = Bbox([point + offset - size / 2, point + offset + size / 2])
            leader = MplPath([point, point + offset])
            cost = sum(_overlap(box, other) for other in [*taken, markers[place], *others])
            cost += size[0] * size[1] - _overlap(box, inside)
            cost += CROSSING_PX2 * sum(leader.intersects_bbox(other) for other in others)
            cost += CROSSING_PX2 * sum(other.intersects_bbox(box) for other in leaders)
            if best is None or cost < best[0] - 1e-6:
                best = float(cost), offset, box, leader
            if best[0] < 1e-6:
                break
        assert best is not None  # there is always a first candidate
        offsets.append(best[1])
        labels.append(best[2].padded(3))
        leaders.append(best[3])
    return offsets


def _overlap(one: Bbox, other: Bbox) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return width * height if width > 0 and height > 0 else 0.0


def f1_by_fold(path: Path, folds: Sequence[int], scores: Mapping[str, Sequence[float]], n_targets: int) -> None:
    """Weighted F1 of every model on every fold, a line a model, best model first in `scores`.

    Args:
        path: the PNG to write.
        folds: the k fold numbers.
        scores: model name to its k scores.
        n_targets: over which the scores are means.
    """
    names = list(scores)
    height_in = max(3.6, 1.4 + 0.21 * len(names))
    with figure(path, 8.6, height_in) as drawing:
        axes = drawing.add_subplot()
        places = range(len(folds))
        for rank, name in reversed(list(enumerate(names))):
            told_apart = rank < len(SERIES)
            axes.plot(
                places, scores[name], color=SERIES[rank] if told_apart else PALE, zorder=4 if told_apart else 2,
                marker=MARKERS[rank] if told_apart else "o", ms=5.5, lw=1.4,
            )  # fmt: skip
        axes.set_xticks(places, [str(fold) for fold in folds])
        axes.set_xlim(-0.25, len(folds) - 0.75)
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_locator(MaxNLocator(7))
        axes.margins(y=0.1)
        axes.set_xlabel("fold")
        axes.set_ylabel(f"weighted F1{_of_targets(n_targets)}")
        axes.set_title("The same folds, every model", loc="left")
        low, high = axes.get_ylim()
        heights = _apart([scores[name][-1] for name in names], gap=(high - low) * 0.2 / (height_in - 1.2))
        for rank, (name, height) in enumerate(zip(names, heights, strict=True)):
            end = len(folds) - 0.68
            axes.plot([len(folds) - 0.94, end - 0.03], [scores[name][-1], height], color=PALE, lw=0.7, clip_on=False)
            axes.text(end, height, short(name), va="center", color=SERIES[rank] if rank < len(SERIES) else SOFT)
        axes.set_ylim(low, high)


def _of_targets(n_targets: int) -> str:
    return f", mean of {n_targets} targets" if n_targets > 1 else ""


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Moves heights until they are at least `gap` apart: those that crowd form a ladder around their mean."""
    ladders: list[list[int]] = []
    middles: list[float] = []
    for place in sorted(range(len(heights)), key=lambda place: heights[place]):
        ladder = [place]
        middle = heights[place]
        while ladders and middle - middles[-1] < gap * (len(ladder) + len(ladders[-1])) / 2:
            ladder = ladders.pop() + ladder
            middles.pop()
            middle = float(np.mean([heights[member] for member in ladder]))
        ladders.append(ladder)
        middles.append(middle)
    moved = list(heights)
    for ladder, middle in zip(ladders, middles, strict=True):
        for step, place in enumerate(ladder):
            moved[place] = middle + (step - (len(ladder) - 1) / 2) * gap
    return moved
