"""Stage `split`: a holdout for ever, near copies and senders kept together, even folds."""

import hashlib
import random
import string
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import content, load_params
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.model_selection import StratifiedKFold
from split_help import labelled, run, side_of, two_sides, write_data

from pipeline_steps import split
from pipeline_steps.errors import PleatError
from pipeline_steps.params import Holdout, Split

NEAR = 4  # bits, as in params.yaml


def settings_of(fraction: float = 0.5, group_by: str | None = None, distance: int = NEAR) -> Split:
    return Split(
        given=False,
        group_by=group_by,  # type: ignore[arg-type]
        near_copy_max_distance=distance,
        holdout=Holdout(fraction=fraction, salt="pleat"),
    )


def frame(batches: dict[str, list[tuple[str, int, str]]]) -> pd.DataFrame:
    """A manifest of (sample_id, hash, sender)."""
    rows = [
        (sample, name, f"{hash_:016x}", sender) for name, batch in batches.items() for sample, hash_, sender in batch
    ]
    return pd.DataFrame(rows, columns=["sample_id", "batch", "phash", "sender_id"])


def assigned(batches: dict[str, list[tuple[str, int, str]]], of: Split) -> pd.DataFrame:
    manifest = frame(batches)
    return pd.concat([manifest, split.assign_groups(manifest, list(batches), of)], axis=1).set_index("sample_id")


def are_near(left: str, right: str) -> bool:
    return bin(int(left, 16) ^ int(right, 16)).count("1") <= NEAR


# Hashes in a chain, each two bits from the next, so that near copies of near copies abound; and lone ones.
CHAIN = [0]
for bit in range(0, 24, 2):
    CHAIN.append(CHAIN[-1] | 3 << bit)
HASHES = st.one_of(st.sampled_from(CHAIN), st.integers(0, 2**64 - 1))
BATCHES = st.lists(
    st.lists(st.tuples(HASHES, st.sampled_from(["", "", "ann", "bob", "cy", " "])), max_size=12), min_size=1, max_size=4
)


def named(batches: list[list[tuple[int, str]]], seed: int) -> dict[str, list[tuple[str, int, str]]]:
    """Gives the samples ids at random, so that every mixture of sides comes up."""
    letters = random.Random(seed)
    return {
        f"batch{number}": [("".join(letters.choices(string.hexdigits, k=8)), *sample) for sample in batch]
        for number, batch in enumerate(batches)
    }


@settings(max_examples=100, deadline=None)
@given(BATCHES, st.integers(0, 2**32), st.sampled_from([None, "sender_id"]), st.sampled_from([0.0, 0.15, 0.5]))
def test_what_belongs_together_stays_together(
    batches: list[list[tuple[int, str]]], seed: int, group_by: str | None, fraction: float
) -> None:
    rows = assigned(named(batches, seed), settings_of(fraction, group_by))
    if fraction == 0:
        assert not rows["straddling"].any()
        assert set(rows["side"]) <= {"train"}
    kept = rows[~rows["straddling"]]
    tied = {
        (one, other)
        for one, other in combinations(kept.index, 2)
        if are_near(kept["phash"][one], kept["phash"][other])
        or (group_by and kept["sender_id"][one].strip() and kept["sender_id"][one] == kept["sender_id"][other])
    }
    # The groups must be exactly what hangs together, found here by merging sets.
    together = {sample: {sample} for sample in kept.index}
    for one, other in tied:
        if together[one] is not together[other]:
            together[one] |= together[other]
            for sample in together[other]:
                together[sample] = together[one]
    for one, other in combinations(kept.index, 2):
        same_group = kept["group"][one] == kept["group"][other]
        assert same_group == (together[one] is together[other])
        assert not same_group or kept["side"][one] == kept["side"][other]
    for sample, row in rows[rows["straddling"]].iterrows():
        older = rows[rows["batch"] < row["batch"]]
        near = older["phash"].map(lambda other, row=row: are_near(other, row["phash"]))
        bound = near | ((older["sender_id"] == row["sender_id"]) & bool(group_by and row["sender_id"].strip()))
        assert (older[bound]["side"] != row["side"]).any(), f"{sample} is left out without need"


@settings(max_examples=100, deadline=None)
@given(BATCHES, st.integers(0, 2**32), st.sampled_from([None, "sender_id"]), st.randoms(use_true_random=False))
def test_a_later_batch_moves_no_older_sample(
    batches: list[list[tuple[int, str]]], seed: int, group_by: str | None, shuffler: random.Random
) -> None:
    whole = named(batches, seed)
    of = settings_of(group_by=group_by)
    before = assigned(dict(list(whole.items())[:-1]), of)
    newest = list(whole)[-1]
    shuffler.shuffle(whole[newest])
    after = assigned(whole, of).loc[before.index]
    for column in ("side", "straddling"):
        assert dict(after[column]) == dict(before[column])


def test_a_sample_on_its_own_has_the_side_of_its_salted_hash() -> None:
    for fraction in (0.1, 0.5, 0.9):
        holdout = Holdout(fraction=fraction, salt="pleat")
        for name in "abcdefgh":
            share = int(hashlib.sha256(f"pleat:{name}".encode()).hexdigest(), 16) / 2**256
            assert split.in_holdout(name, holdout) == (share < fraction)


def test_the_fraction_is_kept_and_grows_without_letting_go() -> None:
    samples = [f"sample{number}" for number in range(20_000)]
    sides = {
        fraction: {name for name in samples if split.in_holdout(name, Holdout(fraction=fraction, salt="pleat"))}
        for fraction in (0.0, 0.05, 0.15, 0.5)
    }
    assert sides[0.0] == set()
    assert sides[0.05] < sides[0.15] < sides[0.5]
    for fraction, chosen in sides.items():
        deviation = (20_000 * fraction * (1 - fraction)) ** 0.5
        assert abs(len(chosen) - 20_000 * fraction) <= 4 * deviation
    other = {name for name in samples if split.in_holdout(name, Holdout(fraction=0.15, salt="other"))}
    assert len(other & sides[0.15]) < 0.2 * len(other), "another salt is another holdout"


def test_only_the_sample_between_the_sides_is_left_out() -> None:
    train, holdout = two_sides()
    rows = assigned(
        {
            "old": [(train, 0b0, "ann"), (holdout, 0b11111111, "bob")],
            # One sender of many images, one of which lies between the sides.
            "new": [("between", 0b1111, "cy"), *((f"cy{number}", 2**40 << number * 5, "cy") for number in range(4))],
        },
        settings_of(group_by="sender_id"),
    )
    assert list(rows.index[rows["straddling"]]) == ["between"]
    assert rows.loc[[f"cy{number}" for number in range(4)], "group"].nunique() == 1
    # The same without senders: the others are groups of their own.
    assert rows.loc[train, "side"] == side_of("ann")


def test_what_was_left_out_draws_no_later_sample_along() -> None:
    train, holdout = two_sides()
    rows = assigned(
        {
            "old": [(train, 0b0, ""), (holdout, 0b11111111, "")],
            "new": [("between", 0b1111, "")],
            "newer": [("at train", 0b1, ""), ("at holdout", 0b111111, "")],  # both near copies of `between` too
        },
        settings_of(),
    )
    assert list(rows.index[rows["straddling"]]) == ["between"]
    assert rows.loc["at train", "side"] == "train"
    assert rows.loc["at holdout", "side"] == "holdout"


def test_a_new_sample_between_two_groups_of_one_side_joins_their_folds() -> None:
    ids = [name for name in (f"{number:064x}" for number in range(20)) if side_of(name) == "train"]
    rows = assigned({"old": [(ids[0], 0b0, ""), (ids[1], 0b11111111, "")], "new": [("n", 0b1111, "")]}, settings_of())
    assert not rows["straddling"].any()
    assert rows["group"].nunique() == 1, "otherwise near copies could lie in two folds"
    assert set(rows["side"]) == {"train"}


def test_thousands_of_equal_pictures_take_no_memory_to_speak_of() -> None:
    samples = [(f"s{number}", 0, "") for number in range(20_000)]
    rows = assigned({"a": samples[:10_000], "b": samples[10_000:]}, settings_of())
    assert rows["group"].nunique() == 1
    assert rows["side"].nunique() == 1


# ---- the stage


SIZES = {"Hat": 203, "Pants": 150, "Shirt": 77, "Top": 23, "Body": 11, "Cap": 5}
LARGE = {"Hat": 203, "Pants": 150, "Shirt": 77}


def test_folds_are_as_even_as_scikit_learns_own(tmp_path: Path) -> None:
    write_data(tmp_path, {"a": labelled(**SIZES)})
    rows = run(tmp_path, holdout__fraction=0)
    assert list(rows.columns) == ["sample_id", "batch", "label", "group", "side", "fold"]
    assert rows["sample_id"].is_unique
    assert set(rows["fold"]) == set(range(5))
    assert rows["group"].is_unique
    ours = pd.crosstab(rows["label"], rows["fold"])
    theirs = pd.Series(-1, index=rows.index)
    for number, (_, scored) in enumerate(StratifiedKFold(5, shuffle=True, random_state=0).split(rows, rows["label"])):
        theirs[scored] = number
    theirs = pd.crosstab(rows["label"], theirs)
    for label, size in SIZES.items():
        assert ours.loc[label].sum() == size
        assert sorted(ours.loc[label]) == sorted(theirs.loc[label]), "floor or ceiling of a fifth in every fold"
    assert ours.sum().max() - ours.sum().min() <= len(SIZES)


def test_senders_are_kept_whole_and_samples_without_one_are_not_lumped_together(tmp_path: Path) -> None:
    rows = [
        row | {"sender_id": f"s{number % 40}" if number % 3 else ""} for number, row in enumerate(labelled(**LARGE))
    ]
    write_data(tmp_path, {"a": rows})
    folds = run(tmp_path, group_by="sender_id", holdout__fraction=0.3)
    senders = pd.read_parquet(tmp_path / "data" / "validate" / "manifest.parquet").set_index("sample_id")["sender_id"]
    folds["sender"] = folds["sample_id"].map(senders)
    known = folds[folds["sender"] != ""].groupby("sender")
    assert (known["side"].nunique() == 1).all()
    assert (known["fold"].nunique() == 1).all()
    assert (known["group"].nunique() == 1).all()
    assert known["side"].first().nunique() == 2, "some senders lie in the holdout"
    unknown = folds[folds["sender"] == ""]
    assert unknown["group"].is_unique
    assert set(unknown["side"]) == {"train", "holdout"}
    plain = run(tmp_path, holdout__fraction=0.3)
    assert plain["group"].is_unique


def test_a_near_copy_between_the_sides_is_listed_and_left_out(tmp_path: Path) -> None:
    train, holdout = two_sides()
    first = [{"label": "Hat", "sample_id": train, "phash": f"{0:016x}"}]
    first.append({"label": "Hat", "sample_id": holdout, "phash": f"{0b11111111:016x}"})
    write_data(tmp_path, {"a": [*first, *labelled(Hat=30, Pants=30)]})
    before = run(tmp_path, holdout__fraction=0.5)
    columns = ["sample_id", "batch", "source_path", "label", "detail"]
    empty = pd.read_parquet(tmp_path / "data" / "split" / "straddling.parquet")
    assert list(empty.columns) == columns
    assert len(empty) == 0

    root = tmp_path / "more"
    between = {"label": "Pants", "sample_id": "f" * 64, "phash": f"{0b1111:016x}"}
    write_data(root, {"a": [*first, *labelled(Hat=30, Pants=30)], "b": [between, *labelled(Hat=3)]})
    after = run(root, holdout__fraction=0.5)
    (left_out,) = pd.read_parquet(root / "data" / "split" / "straddling.parquet").to_dict("records")
    assert list(left_out) == columns
    assert left_out["sample_id"] == "f" * 64
    assert (left_out["batch"], left_out["source_path"], left_out["label"]) == ("b", "images/0.jpg", "Pants")
    assert left_out["detail"] == "near copy of samples on both sides of the holdout"
    assert "f" * 64 not in set(after["sample_id"])
    old = after.set_index("sample_id").loc[before["sample_id"], "side"]
    assert list(old) == list(before["side"])
    assert len(after) == len(before) + 3


def test_labels_dropped_later_move_no_other_sample(tmp_path: Path) -> None:
    # Every third sample is a near copy of the one before it, of another label.
    rows = labelled(Hat=60, Pants=60, Skip=60)
    random.Random(0).shuffle(rows)
    for number in range(0, 180, 3):
        rows[number]["phash"] = rows[number + 1]["phash"] = random.Random(number).randbytes(8).hex()
    write_data(tmp_path, {"a": rows})
    whole = run(tmp_path, holdout__fraction=0.3).set_index("sample_id")
    write_data(tmp_path / "dropped", {"a": rows}, dropped=("Skip",))
    rest = run(tmp_path / "dropped", holdout__fraction=0.3).set_index("sample_id")
    assert set(rest["label"]) == {"Hat", "Pants"}
    assert list(rest["side"]) == list(whole.loc[rest.index, "side"])
    assert list(rest["group"]) == list(whole.loc[rest.index, "group"])


def test_a_seed_gives_the_same_folds_and_another_seed_others(tmp_path: Path) -> None:
    write_data(tmp_path, {"a": labelled(**LARGE)})
    first = run(tmp_path, seed=1)
    written = content(tmp_path / "data" / "split") | content(tmp_path / "reports" / "split")
    pd.testing.assert_frame_equal(run(tmp_path, seed=1), first)
    assert content(tmp_path / "data" / "split") | content(tmp_path / "reports" / "split") == written
    second = run(tmp_path, seed=2)
    assert list(second["side"]) == list(first["side"])
    assert (second["fold"] != first["fold"]).mean() > 0.3


def test_a_class_too_small_for_the_folds_is_named_with_the_choices(tmp_path: Path) -> None:
    write_data(tmp_path, {"a": labelled(Hat=20, Cap=4, Scarf=2)})
    with pytest.raises(PleatError) as caught:
        run(tmp_path, holdout__fraction=0)
    assert str(caught.value) == (
        "Too few samples outside the holdout for 5 folds: class 'Cap' of target label has 4, class 'Scarf' of target "
        "label has 2. Drop such a class (labels.drop), merge it into another one (labels.merge), or use fewer folds "
        "(experiment.folds)."
    )
    assert not (tmp_path / "data" / "split").exists()
    assert set(run(tmp_path, holdout__fraction=0, folds=[0, 1])["fold"]) == {0, 1}
    with pytest.raises(PleatError, match="class 'Cap' of target label has 0, class 'Hat' of target label has 0"):
        run(tmp_path, holdout__fraction=0.999999)


def test_fewer_groups_than_folds_is_a_sentence_and_a_class_of_few_groups_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(
        tmp_path, {"a": [row | {"sender_id": f"s{number % 3}"} for number, row in enumerate(labelled(Hat=30, Cap=30))]}
    )
    with pytest.raises(PleatError, match=r"form 3 groups, fewer than the 5 folds\. Use fewer folds .*group_by: null"):
        run(tmp_path, group_by="sender_id", holdout__fraction=0)
    few = [{"label": "Cap", "sender_id": "one"} for _ in range(9)]
    write_data(tmp_path / "few", {"a": [*labelled(Hat=30), *few]})
    folds = run(tmp_path / "few", group_by="sender_id", holdout__fraction=0)
    (lone,) = folds.loc[folds["label"] == "Cap", "fold"].unique()
    others = ", ".join(f"fold {number}" for number in range(5) if number != lone)
    warning = f"split: warning: no sample of class 'Cap' of target label in {others}, so no score there\n"
    assert warning in capsys.readouterr().out
    assert folds["fold"].nunique() == 5


def test_the_reports_show_every_class_and_fold(tmp_path: Path) -> None:
    write_data(tmp_path, {"a": labelled(**LARGE | {r"$\bad{$": 20, "Kleid für Ähnliche": 20})})
    rows = run(tmp_path, holdout__fraction=0.15, folds=list(range(3)))
    balance = pd.read_csv(tmp_path / "reports" / "split" / "balance.csv").set_index("label")
    assert list(balance.columns) == ["fold 0", "fold 1", "fold 2", "holdout"]
    counted = Counter(zip(rows["label"], rows["fold"], strict=True))
    for label in rows["label"].unique():
        assert list(balance.loc[label]) == [counted[label, fold] for fold in (0, 1, 2, -1)]
    with Image.open(tmp_path / "reports" / "split" / "balance.png") as picture:
        assert picture.width > 800
        assert np.asarray(picture.convert("L")).std() > 10
    assert list(pd.read_csv(tmp_path / "reports" / "split" / "balance.csv")["label"]) == sorted(rows["label"].unique())


def test_the_real_clothing_set(clothing: Path) -> None:
    for keys, unique in ({"split.group_by": None}, True), ({"split.group_by": "sender_id"}, False):
        split.run(load_params({"experiment.batches": ["clothing"], **keys}), clothing)
        rows = pd.read_parquet(clothing / "data" / "split" / "folds.parquet")
        assert len(rows) == 5096
        if unique:  # with 344 senders of very different sizes the holdout's share is a matter of luck
            assert 0.13 < (rows["side"] == "holdout").mean() < 0.17
            per_fold = pd.crosstab(rows["label"], rows["fold"]).drop(columns=-1)
            assert (per_fold.max(axis=1) - per_fold.min(axis=1)).max() <= 2
        assert (rows[rows["side"] == "train"].groupby("group")["fold"].nunique() == 1).all()
        assert (rows.groupby("group")["side"].nunique() == 1).all()


# ---- several targets


def test_the_label_columns_of_all_targets_stand_in_the_tables(tmp_path: Path) -> None:
    train, holdout = two_sides()
    names = [(colour, garment) for _ in range(20) for colour in ("red", "blue") for garment in ("hat", "cap")]
    pairs = [{"colour": colour, "garment": garment} for colour, garment in names]
    pairs[0] |= {"sample_id": train, "phash": f"{0:016x}"}
    pairs[1] |= {"sample_id": holdout, "phash": f"{0b11111111:016x}"}
    between = {"sample_id": "f" * 64, "phash": f"{0b1111:016x}", "colour": "red", "garment": "cap"}
    write_data(tmp_path, {"a": pairs, "b": [between]})
    tags = {"tags": {"kind": "multilabel", "of": ["garment", "colour"]}}
    both = {"colour": {"kind": "multiclass"}, "garment": {"kind": "multiclass"}}
    for targets, columns in ((both, ["colour", "garment"]), (tags, ["garment", "colour"]), (tags | both, [])):
        rows = run(tmp_path, targets, holdout__fraction=0.5)
        columns = columns or ["garment", "colour"]
        assert list(rows.columns) == ["sample_id", "batch", *columns, "group", "side", "fold"]
        manifest = pd.read_parquet(tmp_path / "data" / "validate" / "manifest.parquet").set_index("sample_id")
        assert (rows.set_index("sample_id")[columns] == manifest.loc[rows["sample_id"], columns]).all(axis=None)
        left_out = pd.read_parquet(tmp_path / "data" / "split" / "straddling.parquet")
        assert list(left_out.columns) == ["sample_id", "batch", "source_path", *columns, "detail"]
        assert list(left_out["sample_id"]) == ["f" * 64]


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_the_reports_of_several_targets_count_every_class_of_each(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [{"colour": rng.choice(["red", "blue"]), "garment": rng.choice(["hat", "cap", "tie"])} for _ in range(200)]
    write_data(tmp_path, {"a": rows})
    targets: dict[str, Any] = {"garment": {"kind": "multiclass"}, "colour": {"kind": "multiclass"}}
    if kind == "multilabel":
        targets = {"tags": {"kind": "multilabel", "of": ["colour", "garment"]}}
    folds = run(tmp_path, targets, holdout__fraction=0.2, folds=[0, 1, 2])
    balance = pd.read_csv(tmp_path / "reports" / "split" / "balance.csv")
    counted = Counter()
    for column in ("colour", "garment"):
        counted.update(zip(folds[column], folds["fold"], strict=True))
    parts = ["fold 0", "fold 1", "fold 2", "holdout"]
    for _, row in balance.iterrows():
        assert list(row[parts]) == [counted[row["label"], fold] for fold in (0, 1, 2, -1)]
    if kind == "multilabel":
        assert list(balance.columns) == ["label", *parts]
        assert list(balance["label"]) == ["blue", "cap", "hat", "red", "tie"]
    else:
        assert list(balance.columns) == ["target", "label", *parts]
        assert list(balance["target"]) == ["garment"] * 3 + ["colour"] * 2
        assert list(balance["label"]) == ["cap", "hat", "tie", "blue", "red"]
    with Image.open(tmp_path / "reports" / "split" / "balance.png") as picture:
        assert picture.height > 34 * len(balance)
