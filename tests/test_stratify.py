"""Even folds: scikit-learn's where classes can be combined, iterative stratification elsewhere."""

import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import label_tables
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import KFold, StratifiedGroupKFold

from pipeline_steps.errors import PleatError
from pipeline_steps.stratify import indicators, iterative_stratification, stratified_folds
from pipeline_steps.targets import Target

Groups = list[list[set[int]]]  # the classes of each sample of each group


def multiclass(rows: pd.DataFrame, *names: str) -> list[Target]:
    return [Target(name, False, [name], sorted(set(rows[name]))) for name in names]


def multilabel(rows: pd.DataFrame, *columns: str) -> list[Target]:
    return [Target("tags", True, list(columns), sorted({label for column in columns for label in rows[column]}))]


def framed(labels: pd.DataFrame, group_size: int = 1, seed: int = 0) -> pd.DataFrame:
    """Adds groups of random members, `group_size` on average, and a holdout of whole groups."""
    rng = np.random.default_rng(seed)
    n_groups = max(1, len(labels) // group_size)
    group = np.arange(len(labels)) if group_size == 1 else rng.integers(0, n_groups, len(labels))
    held = rng.random(len(labels)) < 0.15  # by group's number
    side = np.where(held[group], "holdout", "train")
    return labels.assign(group=[f"g{number:05d}" for number in group], side=side)


def algorithm_1(groups: Groups, n_classes: int, k: int) -> list[int]:
    """The pseudo-code of the paper, line by line; a group of samples goes where its pseudo-code sends one sample.

    Where the paper leaves a choice open, the first is taken.
    """
    fold = [-1] * len(groups)
    r = [Fraction(1, k)] * k
    everything = [sample for group in groups for sample in group]
    c = [len(everything) * r[j] for j in range(k)]
    c_of = [[sum(i in sample for sample in everything) * r[j] for i in range(n_classes)] for j in range(k)]
    while -1 in fold:
        waiting = [number for number in range(len(groups)) if fold[number] == -1]
        size = [sum(i in sample for number in waiting for sample in groups[number]) for i in range(n_classes)]
        rarest = min((i for i in range(n_classes) if size[i] > 0), key=lambda i: size[i])
        for number in waiting:
            if not any(rarest in sample for sample in groups[number]):
                continue
            most = max(c_of[j][rarest] for j in range(k))
            best = [j for j in range(k) if c_of[j][rarest] == most]
            if len(best) > 1:
                largest = max(c[j] for j in best)
                best = [j for j in best if c[j] == largest]
            m = best[0]
            fold[number] = m
            for sample in groups[number]:
                for i in sample:
                    c_of[m][i] -= 1
                c[m] -= 1
    return fold


def counted(groups: Groups, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    counts = [[sum(i in sample for sample in group) for i in range(n_classes)] for group in groups]
    return np.array(counts, dtype=np.int64), np.array([len(group) for group in groups])


N_CLASSES = 6
SAMPLES = st.sets(st.integers(0, N_CLASSES - 1), min_size=1, max_size=4)
SINGLE = st.lists(SAMPLES.map(lambda sample: [sample]), min_size=1, max_size=60)
GROUPED = st.lists(st.lists(SAMPLES, min_size=1, max_size=7), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(st.one_of(SINGLE, GROUPED), st.integers(2, 7), st.integers(0, 2**32 - 1))
def test_iterative_stratification_is_the_algorithm_of_the_paper(groups: Groups, k: int, seed: int) -> None:
    found = iterative_stratification(*counted(groups, N_CLASSES), k, seed)
    order = sorted(np.random.default_rng(seed).permutation(len(groups)), key=lambda number: -len(groups[number]))
    assert list(found[order]) == algorithm_1([groups[number] for number in order], N_CLASSES, k)
    assert set(found) <= set(range(k))
    if len(groups) >= k:
        assert set(found) == set(range(k)), "no fold stays empty"


@pytest.mark.parametrize("seed", range(5))
def test_a_case_with_one_even_answer(seed: int) -> None:
    # Two of A with B, two of B alone, two of C: one of each belongs in each half.
    counts = np.array([[1, 1, 0], [1, 1, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    fold = iterative_stratification(counts, np.ones(6, dtype=np.int64), 2, seed)
    for half in (0, 1):
        assert counts[fold == half].sum(axis=0).tolist() == [1, 2, 1]
        assert (fold == half).sum() == 3
    # A group of three of A outweighs three single ones, and they come in any order.
    counts = np.array([[1], [1], [3], [1]])
    fold = iterative_stratification(counts, counts[:, 0], 2, seed)
    assert fold[0] == fold[1] == fold[3] != fold[2]


def distance(applies: np.ndarray, fold: np.ndarray) -> float:
    """LD of the paper: how far the odds of each class in each fold lie from those in all samples, on average."""

    def odds(part: np.ndarray) -> np.ndarray:
        return part.sum(axis=0) / (len(part) - part.sum(axis=0))

    return float(np.mean([np.abs(odds(applies[fold == number]) - odds(applies)) for number in set(fold)]))


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("kind", ["one target a column", "one target of all columns"])
@pytest.mark.parametrize("data", ["apparel", "attributes"])
def test_real_labels_lie_more_evenly_than_in_random_folds(
    data: str, kind: str, group_size: int, real_data: Path
) -> None:
    labels = getattr(label_tables, data)(real_data).drop(columns="given", errors="ignore")
    rows = framed(labels, group_size)
    targets = (multiclass if kind == "one target a column" else multilabel)(labels, *labels.columns)
    train = rows[rows["side"] == "train"]
    applies = indicators(targets, train)
    assert (applies.sum(axis=1) == len(labels.columns)).all(), "each column gives one class"
    groups = train["group"].unique()
    for seed in range(3):
        fold = stratified_folds(rows, targets, 5, seed)
        assert (fold[rows["side"] == "holdout"] == -1).all()
        found = fold[train.index]
        assert set(found) == set(range(5))
        assert (found.groupby(train["group"]).nunique() == 1).all()
        by_group = {}
        for number, (_, scored) in enumerate(KFold(5, shuffle=True, random_state=seed).split(groups)):
            by_group |= dict.fromkeys(groups[scored], number)
        plain = train["group"].map(by_group).to_numpy()
        assert distance(applies, found.to_numpy()) <= distance(applies, plain) / (4 if group_size == 1 else 1)
        pd.testing.assert_series_equal(stratified_folds(rows, targets, 5, seed), fold)
        assert (stratified_folds(rows, targets, 5, seed + 1) != fold).mean() > 0.3


def test_every_fold_of_the_real_attributes_holds_every_class(real_data: Path) -> None:
    labels = label_tables.attributes(real_data)
    columns = list(labels.columns.drop("given"))
    rows = labels.assign(group=[f"{number:05d}" for number in range(len(labels))], side="train")
    fold = stratified_folds(rows, multiclass(labels, *columns), 5, 17)
    for column in columns:
        counts = pd.crosstab(labels[column], fold)
        assert counts.to_numpy().min() >= 4, "the rarest class has 21 samples"
        fair = counts.sum(axis=1) / 5
        assert (counts.sub(fair, axis=0).abs().max(axis=1) <= 1 + 0.01 * fair).all()


def scikit_learns(rows: pd.DataFrame, labels: pd.Series, k: int, seed: int) -> pd.Series:
    fold = pd.Series(-1, index=rows.index)
    train = rows.index[rows["side"] == "train"]
    splitter = StratifiedGroupKFold(k, shuffle=True, random_state=seed)
    for number, (_, scored) in enumerate(splitter.split(train, labels[train], rows["group"][train])):
        fold[train[scored]] = number
    return fold


@pytest.mark.parametrize("group_size", [1, 3])
def test_one_target_is_split_by_scikit_learn_and_several_by_their_combinations(group_size: int) -> None:
    rng = np.random.default_rng(0)
    labels = pd.DataFrame(
        {"colour": rng.choice(["red", "Blue", "äx"], 300), "garment": rng.choice(["hat", "cap"], 300)}
    )
    rows = framed(labels, group_size)
    for seed in (0, 17):
        one = stratified_folds(rows, multiclass(rows, "colour"), 4, seed)
        pd.testing.assert_series_equal(one, scikit_learns(rows, rows["colour"], 4, seed))
        both = stratified_folds(rows, multiclass(rows, "colour", "garment"), 4, seed)
        pd.testing.assert_series_equal(both, scikit_learns(rows, rows["colour"] + " " + rows["garment"], 4, seed))


@pytest.mark.filterwarnings("ignore:The least populated class")
@pytest.mark.parametrize("n_rare", [3, 4])
def test_a_combination_rarer_than_the_folds_is_spread_class_by_class(n_rare: int) -> None:
    pairs = [("red", "hat")] * 20 + [("blue", "cap")] * 20 + [("red", "cap")] * 20 + [("blue", "hat")] * n_rare
    labels = pd.DataFrame(pairs, columns=["colour", "garment"])
    rows = labels.assign(group=[f"g{number:03d}" for number in range(len(pairs))], side="train")
    targets = multiclass(rows, "colour", "garment")
    fold = stratified_folds(rows, targets, 4, 17)
    joint = scikit_learns(rows, rows["colour"] + rows["garment"], 4, 17)
    single = iterative_stratification(indicators(targets, rows), np.ones(len(rows), dtype=np.int64), 4, 17)
    assert list(fold) == list(joint if n_rare == 4 else single)
    assert list(joint) != list(single)
    # A multilabel target is always spread class by class.
    tags = multilabel(rows, "colour", "garment")
    single = iterative_stratification(indicators(tags, rows), np.ones(len(rows), dtype=np.int64), 4, 17)
    assert list(stratified_folds(rows, tags, 4, 17)) == list(single)


def test_indicators_mark_each_class_of_each_target() -> None:
    rows = pd.DataFrame({"colour": ["red", "blue", "red"], "garment": ["hat", "hat", "cap"]})
    colour, garment = multiclass(rows, "colour", "garment")
    assert indicators([colour, garment], rows).tolist() == [[0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]]
    (tags,) = multilabel(rows, "colour", "garment")
    assert tags.classes == ["blue", "cap", "hat", "red"]
    assert indicators([tags, garment], rows).tolist() == [[0, 0, 1, 1, 0, 1], [1, 0, 1, 0, 0, 1], [0, 1, 0, 1, 1, 0]]


@pytest.mark.parametrize("kind", [multiclass, multilabel])
def test_the_order_of_the_rows_changes_no_fold(kind: Any) -> None:
    letters = random.Random(3)
    labels = pd.DataFrame({name: letters.choices("abcdef"[place:], k=200) for place, name in enumerate(("x", "y"))})
    labels["y"] += labels["y"]  # so that no class is in both
    rows = framed(labels, 2)
    targets = kind(labels, "x", "y")
    fold = stratified_folds(rows, targets, 3, 5)
    shuffled = rows.sample(frac=1, random_state=1)
    pd.testing.assert_series_equal(stratified_folds(shuffled, targets, 3, 5).sort_index(), fold)


def test_a_class_too_small_is_named_with_its_target() -> None:
    rows = pd.DataFrame({"colour": ["red"] * 8 + ["blue"] * 2, "garment": ["hat"] * 9 + ["cap"]})
    rows = rows.assign(group=[str(number) for number in range(10)], side=["holdout"] + ["train"] * 9)
    for targets, named in (
        (multiclass(rows, "colour", "garment"), ("blue' of target colour has 2", "cap' of target garment has 1")),
        (multilabel(rows, "colour", "garment"), ("blue' of target tags has 2", "cap' of target tags has 1")),
    ):
        with pytest.raises(PleatError) as caught:
            stratified_folds(rows, targets, 3, 0)
        assert str(caught.value) == (
            f"Too few samples outside the holdout for 3 folds: class '{named[0]}, class '{named[1]}. Drop such a class "
            "(labels.drop), merge it into another one (labels.merge), or use fewer folds (experiment.folds)."
        )
