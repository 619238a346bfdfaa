"""Stage `split` by the data set's own train and val lists."""

from pathlib import Path
from typing import Any

import label_tables
import pandas as pd
import pytest
from split_help import labelled, run, side_of, write_data

from pipeline_steps.errors import PleatError

GIVEN: dict[str, Any] = {"given": True, "folds": [0]}


def listed(part: str, **counts: int) -> list[dict[str, Any]]:
    return [row | {"given": part} for row in labelled(**counts)]


def test_the_given_val_list_is_the_one_fold_and_the_train_list_is_learned_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path, {"a": [*listed("train", Hat=70, Pants=50), *listed("val", Hat=30, Pants=1)]})
    lists = pd.read_parquet(tmp_path / "data" / "validate" / "manifest.parquet").set_index("sample_id")["given"]
    for fraction in (0, 0.3):
        rows = run(tmp_path, holdout__fraction=fraction, **GIVEN).set_index("sample_id")
        assert len(rows) == 151
        held = pd.Series({name: side_of(name, fraction) == "holdout" for name in rows.index})
        assert ((rows["side"] == "holdout") == held).all()
        assert (rows["fold"] == lists[rows.index].map({"val": 0, "train": 1}).where(~held, -1)).all()
        scored, learned = (rows["fold"] == 0).sum(), (rows["fold"] == 1).sum()
        assert f"{held.sum()} samples in the holdout, {scored} of the val list and {learned} of the train list" in (
            capsys.readouterr().out
        )
        balance = pd.read_csv(tmp_path / "reports" / "split" / "balance.csv")
        assert list(balance.columns) == ["label", "val", "train", *(["holdout"] if fraction else [])]
        assert balance["val"].sum() == scored
    assert held.any()


def test_train_samples_in_one_group_with_the_val_list_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [f"{number:064x}" for number in range(60)]
    train, held = ([name for name in ids if side_of(name) == side] for side in ("train", "holdout"))
    pairs = {  # near copies of each other; a pair lies where its first sample does
        "v0": ("val", train[0]), "t0": ("train", train[1]), "t0 too": ("train", train[2]),
        "v1": ("val", train[3]), "v1 too": ("val", train[4]),
        "t2": ("train", train[5]), "t2 too": ("train", train[6]),
        "v3": ("val", held[0]), "t3": ("train", held[1]),
    }  # fmt: skip
    rows = [
        {"label": "Hat", "given": part, "sample_id": name, "phash": f"{(0xFF00 << 8 * int(key[1])) + place % 2:016x}"}
        for place, (key, (part, name)) in enumerate(pairs.items())
    ]
    write_data(tmp_path, {"a": [*rows, *listed("train", Hat=20), *listed("val", Hat=20)]})
    folds = run(tmp_path, holdout__fraction=0.5, **GIVEN).set_index("sample_id")
    left_out = pd.read_parquet(tmp_path / "data" / "split" / "straddling.parquet")
    assert list(left_out["sample_id"]) == [train[1], train[2]]
    assert set(left_out["detail"]) == {"on the train list, but in one group with samples of the val list"}
    assert len(folds) == len(pairs) + 40 - 2
    assert list(folds.loc[[train[0], train[3], train[4], train[5], train[6]], "fold"]) == [0, 0, 0, 1, 1]
    assert list(folds.loc[held[:2], "side"]) == ["holdout"] * 2
    assert "0 left out as near copies across the holdout, 2 of the train list because their group" in (
        capsys.readouterr().out
    )


def test_a_sender_on_both_lists_is_scored_only(tmp_path: Path) -> None:
    rows = [row | {"sender_id": f"s{number % 7}"} for number, row in enumerate(listed("train", Hat=70))]
    rows += [row | {"sender_id": "s3"} for row in listed("val", Hat=5)]
    write_data(tmp_path, {"a": rows})
    folds = run(tmp_path, group_by="sender_id", holdout__fraction=0, **GIVEN)
    assert dict(folds["fold"].value_counts()) == {1: 60, 0: 5}
    assert set(folds["group"][folds["fold"] == 0]) == {"s3"}
    assert "s3" not in set(folds["group"][folds["fold"] == 1])


def test_samples_without_a_list_are_refused_with_their_number_and_batch(tmp_path: Path) -> None:
    write_data(
        tmp_path, {"a": [*listed("train", Hat=9), *listed("val", Hat=9)], "b": labelled(Hat=4), "c": labelled(Hat=1)}
    )
    with pytest.raises(PleatError) as caught:
        run(tmp_path, **GIVEN)
    assert str(caught.value) == (
        "split.given is true, but 5 samples are on neither a train nor a val list, the first in batch 'b'. Batches "
        "with and without such lists cannot be mixed: take such a batch off experiment.batches, or set split.given: "
        "false and experiment.folds to at least 2."
    )
    assert not (tmp_path / "data" / "split").exists()


def test_lists_that_leave_nothing_to_score_or_to_learn_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path / "no_val", {"a": listed("train", Hat=9)})
    with pytest.raises(PleatError, match="no sample of a val list lies outside the holdout"):
        run(tmp_path / "no_val", holdout__fraction=0, **GIVEN)
    write_data(tmp_path / "unlearned", {"a": [*listed("train", Hat=9), *listed("val", Hat=9, Cap=2, Tie=1)]})
    with pytest.raises(PleatError) as caught:
        run(tmp_path / "unlearned", holdout__fraction=0, **GIVEN)
    assert str(caught.value) == (
        "The train list holds no sample outside the holdout of class 'Cap' of target label, class 'Tie' of target "
        "label. Drop such a class (labels.drop), or merge it into another one (labels.merge)."
    )
    write_data(tmp_path / "unscored", {"a": [*listed("train", Hat=9, Cap=1), *listed("val", Hat=9)]})
    folds = run(tmp_path / "unscored", holdout__fraction=0, **GIVEN)
    assert len(folds) == 19
    assert "warning: no sample of class 'Cap' of target label in val, so no score there" in capsys.readouterr().out


def test_the_lists_of_the_real_attributes(real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = label_tables.attributes(real_data)
    write_data(tmp_path, {"attributes": labels.to_dict("records")})
    columns = list(labels.columns.drop("given"))
    rows = run(tmp_path, {name: {"kind": "multiclass"} for name in columns}, holdout__fraction=0, **GIVEN)
    assert "warning" not in capsys.readouterr().out
    assert list(rows["fold"]) == [1] * 5000 + [0] * 1000
    assert set(rows["side"]) == {"train"}
    balance = pd.read_csv(tmp_path / "reports" / "split" / "balance.csv").set_index(["target", "label"])
    assert len(balance) == 26
    for (target, label), counts in balance.iterrows():
        for part in ("train", "val"):
            assert counts[part] == ((labels[target] == label) & (labels["given"] == part)).sum()
