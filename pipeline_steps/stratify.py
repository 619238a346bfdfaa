"""Folds in which every class of every target is spread evenly, groups kept whole."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from pipeline_steps.errors import PleatError
from pipeline_steps.targets import Target

Ints = npt.NDArray[np.int64]


def stratified_folds(rows: pd.DataFrame, targets: Sequence[Target], n_folds: int, seed: int) -> pd.Series:
    """Fold number a row (-1 in the holdout).

    Multiclass targets are stratified jointly, each combination of their classes as a class of its own. Where a
    combination has fewer samples than there are folds, and for multilabel targets, each class is spread by itself.

    Args:
        rows: with the columns of the targets, group and side ("train" or "holdout").
        targets: at least one.
        n_folds: at least 2.
        seed: the same gives the same folds.

    Raises:
        PleatError: a class has fewer samples than folds, or there are fewer groups than folds.
    """
    fold = pd.Series(-1, index=rows.index)
    train = rows[rows["side"] == "train"]
    small = [f"{name} has {n}" for name, n in class_sizes(targets, train).items() if n < n_folds]
    if small:
        raise PleatError(
            f"Too few samples outside the holdout for {n_folds} folds: {', '.join(small)}. Drop such a class "
            "(labels.drop), merge it into another one (labels.merge), or use fewer folds (experiment.folds)."
        )
    groups, group = np.unique(train["group"], return_inverse=True)
    if len(groups) < n_folds:
        raise PleatError(
            f"The samples outside the holdout form {len(groups)} groups, fewer than the {n_folds} folds. "
            "Use fewer folds (experiment.folds), or do not keep groups whole (split.group_by: null)."
        )
    combination = train.groupby([column for target in targets for column in target.columns]).ngroup()
    if any(target.multilabel for target in targets) or combination.value_counts().min() < n_folds:
        applies = indicators(targets, train)
        counts = np.zeros((len(groups), applies.shape[1]), dtype=np.int64)
        np.add.at(counts, group, applies)
        fold[train.index] = iterative_stratification(counts, np.bincount(group), n_folds, seed)[group]
        return fold
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    for number, (_, scored) in enumerate(splitter.split(train, combination, train["group"])):
        fold[train.index[scored]] = number
    return fold


def class_sizes(targets: Sequence[Target], rows: pd.DataFrame) -> dict[str, int]:
    """How many of the rows have each class, by `class 'NAME' of target TARGET`."""
    names = [f"class '{name}' of target {target.name}" for target in targets for name in target.classes]
    return dict(zip(names, indicators(targets, rows).sum(axis=0).tolist(), strict=True))


def indicators(targets: Sequence[Target], rows: pd.DataFrame) -> Ints:
    """Whether each class of each target applies to each row, as 0 and 1, shape (n, all classes)."""
    columns = []
    for target in targets:
        codes = target.codes(rows)
        columns.append(codes if target.multilabel else np.eye(len(target.classes), dtype=np.int64)[codes])
    return np.hstack(columns).astype(np.int64)


def iterative_stratification(counts: Ints, sizes: Ints, n_folds: int, seed: int) -> Ints:
    """Fold of each group, shape (n_groups,), so that every fold gets an equal share of every class.

    Algorithm 1 of Sechidis, Tsoumakas & Vlahavas 2011, "On the stratification of multi-label data" (ECML PKDD), with
    equal shares and whole groups in the place of samples: the class with the fewest samples left is spread first, each
    time into the fold that lacks most of it, of such folds into the smallest. What the paper leaves to chance is
    settled by order: of classes and folds the first, of groups the largest, equal ones shuffled by the seed.

    Args:
        counts: how many samples of each group have each class, shape (n_groups, n_classes); no row may be all zero.
        sizes: how many samples each group has, shape (n_groups,).
        n_folds: no fold stays empty where there are at least as many groups.
        seed: shuffles.
    """
    shuffled = np.random.default_rng(seed).permutation(len(counts))
    # What remains can make up for a large group only while it is large itself.
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    fold = np.full(len(counts), -1, dtype=np.int64)
    in_fold = np.zeros((n_folds, counts.shape[1]), dtype=np.int64)
    size = np.zeros(n_folds, dtype=np.int64)
    while (waiting := order[fold[order] < 0]).size:
        left = counts[waiting].sum(axis=0)
        rarest = np.where(left > 0, left, left.max() + 1).argmin()
        for group in waiting[counts[waiting, rarest] > 0]:
            # With equal shares the fold that lacks most is the one that has fewest.
            chosen = np.lexsort([size, in_fold[:, rarest]])[0]
            fold[group] = chosen
            in_fold[chosen] += counts[group]
            size[chosen] += sizes[group]
    return fold
