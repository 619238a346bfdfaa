"""The picture of a multilabel target in place of the confusion matrix; style and helpers are those of plots.py."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import precision_recall_curve

from pipeline_steps.out_of_fold import Predictions
from pipeline_steps.plots import INK, PALE, SOFT, figure, scores_by_class, weakest_in_colour


def precision_recall(path: Path, classes: pd.DataFrame, predictions: Predictions) -> None:
    """Left each class's precision over recall, right its average precision.

    The curves are of all folds' predictions together; the dots are what is reached with each fold's own threshold. A
    grey tick beside the average precision is the class's share of the samples, which random scores would reach.

    Args:
        path: the PNG to write.
        classes: the per-class table, rows in the order of the classes.
        predictions: of a multilabel target.
    """
    table = classes.sort_values(["ap_mean", "class"], ascending=[True, False], na_position="first")
    colour = weakest_in_colour(table, "ap_mean")
    several = predictions.samples["fold"].nunique() > 1
    actual, predicted = predictions.actual.astype(bool), predictions.predicted.astype(bool)
    with figure(path, 10.2, max(4.9, 1.3 + 0.24 * len(table))) as drawing:
        left, right = drawing.subplots(1, 2, width_ratios=[1.15, 1])
        for number in table.index[table["ap_mean"].notna()]:
            precision, recall, _ = precision_recall_curve(actual[:, number], predictions.probability[:, number])
            width, order = (1.6, 3) if number in colour else (1.0, 2)
            shade = colour.get(number, PALE)
            left.plot(recall, precision, color=shade, lw=width, zorder=order, drawstyle="steps-post")
            hits = (actual & predicted)[:, number].sum()
            if hits:
                at = hits / actual[:, number].sum(), hits / predicted[:, number].sum()
                edge = INK if number in colour else SOFT
                left.plot(*at, "o", color=shade, markeredgecolor=edge, markeredgewidth=0.6, ms=5, zorder=order + 2)
        left.text(
            0.03,
            0.04,
            f"coloured: as on the right\ndots: {'each fold with its own' if several else 'at the'} threshold",
            color=SOFT,
        )
        left.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal", anchor="N")
        left.set(xlabel="recall", ylabel="precision")
        left.set_title(f"Precision and recall{', all folds together' if several else ''}", loc="left")
        right.plot(actual.mean(axis=0)[table.index], np.arange(len(table)), "|", color=SOFT, ms=9, mew=1.6)
        scores_by_class(right, table, "ap", colour)
        right.set_xlim(-0.02, 1.02)
        right.xaxis.set_major_locator(MaxNLocator(5))
        spread = ", mean ± standard deviation over folds" if several else ""
        right.set_xlabel(f"average precision{spread}\ngrey: share of the images, which random scores reach")
        right.set_title("Average precision", loc="left")
