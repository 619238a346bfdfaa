"""Stage `validate` where samples have several labels: label columns, their rules, and their top classes."""

import hashlib
from collections import Counter
from pathlib import Path

import pytest
from conftest import load_params, write_ingested
from validate_help import BOTH, ENOUGH, MULTICLASS, TWELVE, coloured, entry, run, suite

from pipeline_steps import ingest
from pipeline_steps.errors import PleatError


def test_labels_are_dropped_and_merged_in_every_label_column(root: Path) -> None:
    extra = coloured(
        ("crimson ", "Dress"), ("Other", "shirt"), ("red", "OTHER"), ("other", "other"), ("skirt", "skirt")
    )
    write_ingested(
        root,
        "b",
        [*TWELVE, *extra],
        [
            {"source_path": "x.jpg", "label": "red / Other ", "reason": "missing file"},
            {"source_path": "y.jpg", "label": "other / other", "reason": "undecodable"},
            {"source_path": "z.jpg", "label": "red / dress", "reason": "truncated"},
            {"source_path": "w.jpg", "label": "", "reason": "no label"},
        ],
    )
    manifest, quarantine, counts = run(
        root, BOTH, drop=["Other"], merge={"Crimson": "red", "Dress": "gown", "skirt": "kilt"}
    )
    assert list(manifest.tail(2)[["colour", "garment"]].itertuples(index=False, name=None)) == [
        ("red", "gown"), ("kilt", "kilt")
    ]  # fmt: skip
    assert counts["labels"] == {
        "colour": {"red": 7, "blue": 6, "kilt": 1}, "garment": {"gown": 7, "shirt": 6, "kilt": 1}
    }  # fmt: skip
    assert counts["dropped"] == {"Other": {"samples": 3, "rows_without_image": 2}}
    assert counts["merged"] == {"Crimson": 1, "Dress": 7, "skirt": 1}, "images, not labels, are counted"
    dropped = quarantine[quarantine["reason"] == "dropped label"]
    assert list(dropped["label"]) == ["Other / shirt", "red / OTHER", "other / other"]
    assert list(manifest["given"]) == ["train"] * 14


def test_a_label_with_a_slash_is_one_label_where_there_is_one_column(root: Path) -> None:
    slash = {"source_path": "x.jpg", "label": "Shirt / Other", "reason": "missing file"}
    write_ingested(root, "b", ENOUGH, [slash])
    _, _, counts = run(root, drop=["Other", "shirt / other"])
    assert [n["rows_without_image"] for n in counts["dropped"].values()] == [0, 1]


def test_copies_conflict_where_any_label_column_differs(root: Path) -> None:
    same, recoloured, other = ("a" * 64, "b" * 64, "c" * 64)
    write_ingested(
        root,
        "b",
        [
            *TWELVE,
            *coloured(("red", "dress"), ("red", "dress"), sample_id=same),
            *coloured(("red", "dress"), ("blue", "dress"), sample_id=recoloured),
            *coloured(("red", "dress"), ("blue", "shirt"), ("red", "shirt"), sample_id=other),
        ],
    )
    manifest, quarantine, counts = run(root, BOTH)
    assert list(manifest.tail(1)["sample_id"]) == [same]
    assert len(manifest) == 13
    assert counts["quarantine"] == {"duplicate": 1, "conflicting labels": 5}
    rows = quarantine.set_index("source_path")
    assert rows.loc["images/15.jpg", ["label", "detail"]].tolist() == ["blue / dress", "same bytes as blue / red"]
    assert rows.loc["images/16.jpg", "detail"] == "same bytes as blue / red, dress / shirt"
    # Whoever learns the garments alone has no quarrel about colours.
    manifest, _, counts = run(root, {"garment": MULTICLASS})
    assert list(manifest.tail(2)["sample_id"]) == [same, recoloured]
    assert counts["quarantine"] == {"duplicate": 2, "conflicting labels": 3}


def test_label_columns_that_no_target_reads_are_left_out(root: Path) -> None:
    left_out = {"source_path": "x.jpg", "label": "odd / Other", "reason": "missing file"}
    write_ingested(root, "b", [*TWELVE, *coloured(("odd", "shirt"))], [left_out])
    manifest, quarantine, counts = run(root, {"garment": MULTICLASS}, drop=["odd", "other"])
    assert "colour" not in manifest
    assert list(manifest["garment"]) == [*["dress"] * 6, *["shirt"] * 7], "a colour in labels.drop is not looked at"
    assert list(quarantine["label"]) == ["Other"]
    assert [n["rows_without_image"] for n in counts["dropped"].values()] == [0, 1]
    manifest, _, counts = run(root, {"tags": {"kind": "multilabel", "of": ["garment", "colour"]}})
    assert counts["labels"] == {"garment": {"dress": 6, "shirt": 7}, "colour": {"red": 6, "blue": 6, "odd": 1}}
    assert {"garment", "colour"} <= set(manifest)
    assert "tags" not in manifest


def test_a_batch_without_the_column_of_a_target_is_named(root: Path) -> None:
    write_ingested(root, "apparel", TWELVE)
    write_ingested(root, "clothing", ENOUGH)
    with pytest.raises(PleatError) as caught:
        run(root, {"garment": MULTICLASS})
    assert str(caught.value) == (
        "Target garment is read from the label column garment, but the batch clothing has label; correct `targets` in "
        "params.yaml, or take the batch off experiment.batches."
    )
    with pytest.raises(PleatError, match="Target tags is read from the label column size, but the batch apparel has "
                                         "colour, garment;"):  # fmt: skip
        run(root, {"colour": MULTICLASS, "tags": {"kind": "multilabel", "of": ["garment", "size"]}})


def test_only_the_most_frequent_classes_of_each_column_are_kept(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted over both batches, merged and without copies; of equally frequent ones the first by name is kept."""
    copies = coloured(*[("grey", "dress")] * 9, sample_id="a" * 64)
    write_ingested(root, "one", [*TWELVE, *coloured(("green", "shirt"), ("lime", "shirt")), *copies])
    write_ingested(root, "two", coloured(*[("amber", "hat")] * 2, *[("red", "shirt")] * 2))
    manifest, quarantine, counts = run(root, BOTH, top_classes=3, merge={"lime": "green"})
    assert counts["labels"] == {
        "colour": {"red": 8, "blue": 6, "amber": 2}, "garment": {"dress": 6, "shirt": 8, "hat": 2}
    }  # fmt: skip
    rare = quarantine[quarantine["reason"] == "not a top class"]
    assert list(rare["label"]) == ["green / shirt", "green / shirt", "grey / dress"]
    assert counts["quarantine"] == {"duplicate": 8, "not a top class": 3}
    assert len(manifest) == counts["samples"] == 16
    said = capsys.readouterr().out
    assert "16 samples of 3 colour and 3 garment classes; quarantine: 8 duplicate, 3 not a top class" in said
    _, _, counts = run(root, BOTH, top_classes=100)
    assert counts["samples"] == 19
    _, _, counts = run(root, {"garment": MULTICLASS}, top_classes=2)
    assert counts["labels"] == {"garment": {"dress": 7, "shirt": 10}}


def test_expectations_on_labels_hold_for_each_label_column_and_name_it(root: Path) -> None:
    write_ingested(root, "b", [*TWELVE, *coloured(("red", "x" * 101))])
    with pytest.raises(PleatError) as caught:
        run(root, BOTH)
    message = str(caught.value)
    assert "on column 'garment' failed: a label has 1 to 100 characters; found 1 of 13 rows that break it." in message
    assert "colour" not in message
    page = (root / "reports" / "validation" / "index.html").read_text()
    for column in ("colour", "garment"):
        for rule in ("unique_value_count_to_be_between", "values_to_not_be_null", "value_lengths_to_be_between"):
            assert f"expect_column_{rule} on column &#39;{column}&#39;" in page
        assert f"<h3>{column}</h3>" in page
    assert "&#39;label&#39;" not in page
    with pytest.raises(PleatError, match="column 'colour' failed: a classifier needs at least two classes; found 1"):
        run(root, BOTH, merge={"blue": "red", "x" * 101: "shirt"})
    suite(root, f"""{entry("a", column='"{label}"')}\n{entry("a", column="garment")}""")
    with pytest.raises(PleatError, match="entry 2: a on column 'garment' stands there twice; remove one"):
        run(root, BOTH)


def test_both_labels_of_the_real_apparel_set(real_data: Path, root: Path) -> None:
    (root / "data" / "raw").mkdir()
    (root / "data" / "raw" / "apparel").symlink_to(real_data / "data" / "apparel")
    ingest.run(load_params({"experiment.batches": ["apparel"]}), "apparel", root)
    _, _, counts = run(root, BOTH)
    paths = sorted((real_data / "data" / "apparel").rglob("*.jpg"))
    unique = {hashlib.sha256(path.read_bytes()).digest(): path.parent.name.split("_") for path in paths}
    assert counts["labels"] == {
        "colour": Counter(colour for colour, _ in unique.values()),
        "garment": Counter(garment for _, garment in unique.values()),
    }
    assert counts["quarantine"] == {"duplicate": len(paths) - len(unique)}
    assert counts["warnings"] == []
