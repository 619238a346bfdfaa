"""Stage `validate`: labels dropped and merged, copies removed, expectations that stop the pipeline or warn."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import content, load_params, names, pleat, write_ingested, write_params
from validate_help import ENOUGH, entry, labelled, run, suite

from pipeline_steps import validate
from pipeline_steps.errors import PleatError
from pipeline_steps.expectations import read_suite
from pipeline_steps.files import read_json


def test_labels_are_dropped_whatever_their_case_and_outer_space(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ingested(
        root,
        "b",
        [*ENOUGH, *labelled("Not sure", " NOT SURE ", "not sure\t", "Other", "Otherwise", "Not  sure")],
        [
            {"source_path": "images/x.jpg", "label": " skip", "reason": "missing file"},
            {"source_path": "images/y.jpg", "label": "Skip", "reason": "undecodable"},
            {"source_path": "images/z.jpg", "label": "Hat", "reason": "truncated"},
            {"source_path": "images/w.jpg", "label": "", "reason": "no label"},
        ],
    )
    manifest, quarantine, counts = run(root, drop=["Not sure", "OTHER ", "Skip", "Unseen"])
    assert counts["labels"] == {"label": {"Hat": 6, "Pants": 6, "Otherwise": 1, "Not  sure": 1}}
    assert list(manifest["label"]) == [*["Hat"] * 6, *["Pants"] * 6, "Otherwise", "Not  sure"]
    assert counts["dropped"] == {
        "Not sure": {"samples": 3, "rows_without_image": 0},
        "OTHER ": {"samples": 1, "rows_without_image": 0},
        "Skip": {"samples": 0, "rows_without_image": 2},
        "Unseen": {"samples": 0, "rows_without_image": 0},
    }
    assert counts["drop_matched_nothing"] == ["Unseen"]
    assert counts["samples"] == 14
    assert counts["quarantine"] == {
        "missing file": 1, "undecodable": 1, "truncated": 1, "no label": 1, "dropped label": 4
    }  # fmt: skip
    dropped = quarantine[quarantine["reason"] == "dropped label"]
    assert list(dropped["label"]) == ["Not sure", " NOT SURE ", "not sure\t", "Other"], "as they were spelled"
    said = capsys.readouterr().out
    assert "dropped 'Not sure': 3 samples, 0 rows without image" in said
    assert "dropped 'Skip': 0 samples, 2 rows without image" in said
    assert "labels.drop names 'Unseen', but no row has that label" in said
    assert "'Unseen': 0" not in said


def test_labels_are_merged_and_outer_space_is_no_class_of_its_own(root: Path) -> None:
    write_ingested(root, "b", [*ENOUGH, *labelled("blouse", "Blouse ", " Hat", "Cap")])
    manifest, _, counts = run(root, merge={"Blouse": "Shirt", "Cap": "Hat", "Nothing": "Hat"})
    assert counts["labels"] == {"label": {"Hat": 8, "Pants": 6, "Shirt": 2}}
    assert dict(manifest["label"].value_counts()) == counts["labels"]["label"]
    assert counts["merged"] == {"Blouse": 2, "Cap": 1, "Nothing": 0}


def test_copies_are_kept_once_and_conflicting_labels_not_at_all(root: Path) -> None:
    same, torn, agreed, split = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
    write_ingested(
        root,
        "one",
        [
            *ENOUGH,
            {"sample_id": same, "label": "Hat"},
            {"sample_id": same, "label": " Hat"},
            {"sample_id": torn, "label": "Hat"},
            {"sample_id": torn, "label": "Pants"},
            {"sample_id": agreed, "label": "Blouse"},
            {"sample_id": agreed, "label": "Shirt"},
            {"sample_id": split, "label": "Hat"},
        ],
    )
    write_ingested(
        root,
        "two",
        [
            {"sample_id": same, "label": "Hat", "source_path": "images/again.jpg"},
            {"sample_id": torn, "label": "Hat"},
            {"sample_id": split, "label": "Pants"},
            {"sample_id": "e" * 64, "label": "Skip"},
            {"sample_id": "e" * 64, "label": "Pants"},
        ],
    )
    manifest, quarantine, counts = run(root, drop=["Skip"], merge={"Blouse": "Shirt"})
    assert manifest["sample_id"].is_unique
    kept = manifest.set_index("sample_id")
    assert kept.loc[same, "batch"] == "one", "the first stays"
    assert kept.loc[agreed, "label"] == "Shirt", "labels that are merged into one do not conflict"
    assert kept.loc["e" * 64, "label"] == "Pants", "a dropped label does not conflict"
    assert torn not in kept.index
    assert split not in kept.index
    assert counts["quarantine"] == {"dropped label": 1, "duplicate": 3, "conflicting labels": 5}
    rows = quarantine.set_index(["batch", "source_path"])
    assert rows.loc[("two", "images/again.jpg"), "detail"] == "same bytes as images/12.jpg"
    assert set(quarantine.loc[quarantine["reason"] == "conflicting labels", "detail"]) == {"same bytes as Hat / Pants"}
    assert len(manifest) + len(quarantine) == 19 + 5


def test_a_single_class_left_stops_with_the_expectation_and_what_to_do(root: Path) -> None:
    write_ingested(root, "b", labelled(*["Hat"] * 12, "Skip"))
    write_params(root, {"experiment.batches": ["b"]})
    done = pleat(root, "validate")
    assert done.returncode == 1
    assert done.stderr == (
        "pleat: Expectation expect_column_unique_value_count_to_be_between on column 'label' failed: a classifier "
        "needs at least two classes; found 1. Shorten labels.drop or labels.merge in params.yaml, or add a batch with "
        "other labels. All results: reports/validation/index.html.\n"
    )
    assert names(root / "data") == ["expectations", "ingest"], "nothing that the next stage would take for finished"
    page = (root / "reports" / "validation" / "index.html").read_text()
    assert "The data cannot be trained on" in page
    assert "a classifier needs at least two classes; found 1." in page


def test_nothing_left_at_all(root: Path) -> None:
    write_ingested(root, "b", labelled(*["Skip"] * 12))
    with pytest.raises(
        PleatError, match=r"at least 10 usable images are needed; found 0\. Add a batch .*two classes; found 0"
    ):
        run(root, drop=["skip"])


def test_failing_rows_are_named_and_the_rest_counted(root: Path) -> None:
    wide = [{"label": "Hat", "width": 20_001 + number} for number in range(7)]
    write_ingested(root, "b", [*ENOUGH, *wide, {"label": "x" * 101}])
    with pytest.raises(PleatError) as caught:
        run(root)
    rows = ", ".join(f"b/images/{12 + number}.jpg ({20_001 + number})" for number in range(5))
    assert (
        f"column 'width' failed: images are 16 to 20,000 pixels wide; found 7 of 20 rows that break it. Rows: {rows}. "
        in str(caught.value)
    )
    assert "on column 'label' failed: a label has 1 to 100 characters; found 1 of 20 rows that break it." in str(
        caught.value
    )
    assert not (root / "data" / "validate").exists()


def test_a_failure_leaves_what_was_finished_before(root: Path) -> None:
    write_ingested(root, "b", ENOUGH)
    run(root)
    before = content(root / "data" / "validate")
    with pytest.raises(PleatError):
        run(root, drop=["Hat"])
    assert content(root / "data" / "validate") == before
    assert not list(root.rglob(".partial-*"))


def test_a_warning_is_said_and_does_not_stop(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ingested(root, "b", [*ENOUGH, {"label": "Hat", "width": 500, "height": 100}])
    _, _, counts = run(root)
    (warning,) = counts["warnings"]
    assert "column 'aspect_ratio' failed" in warning
    assert "Rows: b/images/12.jpg (5.0)." in warning
    assert f"validate: warning: {warning}" in capsys.readouterr().out


def test_one_column_may_have_several_expectations_of_one_kind(root: Path) -> None:
    suite(root, "\n".join(entry(column="width", min_value=low, severity=severity, why=f"w{low}") for low, severity in
                          [(16, "critical"), (100, "warning"), (65, "warning"), (64, "critical")]))  # fmt: skip
    write_ingested(root, "b", ENOUGH)
    _, _, counts = run(root)
    assert [re.findall(r"w\d+", warning) for warning in counts["warnings"]] == [["w100"], ["w65"]]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            entry("expect_colum_values_to_be_between", column="width", min_value=1),
            "Great Expectations knows no expectation expect_colum_values_to_be_between; the nearest is "
            "expect_column_values_to_be_between.",
        ),
        (entry("expect_x"), "Great Expectations knows no expectation expect_x; see its gallery of expectations."),
        (entry(colum="width", min_value=1), "expect_column_values_to_be_between: `column`: field required."),
        (
            entry(column="width", min_value="low"),
            "expect_column_values_to_be_between on column 'width': `min_value`: value is not a valid float.",
        ),
        (
            entry(column="nope", min_value=1),
            "expect_column_values_to_be_between on column 'nope' could not be evaluated: Error: The column \"nope\" in "
            "BatchData does not exist.",
        ),
        (entry(severity="fatal"), "PATH, entry 1: `severity` must be 'critical' or 'warning', but got 'fatal'."),
        (entry(advice=None), "PATH, entry 1: `advice` is missing."),
        (f"{entry('a')}\n{entry('b')}\n{entry('a')}", "PATH, entry 3: a stands there twice; remove one."),
        ("", "PATH must hold a list of expectations; restore it with `git checkout PATH`."),
        ("expect: 3", "PATH must hold a list of expectations; restore it with `git checkout PATH`."),
        ("- 3", "PATH, entry 1: it must be a block of keys, but got 3."),
        ("- [", "PATH is not valid YAML: "),
    ],
)
def test_a_wrong_suite_is_one_sentence(root: Path, text: str, sentence: str) -> None:
    suite(root, text)
    write_ingested(root, "b", ENOUGH)
    with pytest.raises(PleatError) as caught:
        run(root)
    assert str(caught.value).startswith(sentence.replace("PATH", str(root / validate.SUITE)))
    assert "\n" not in str(caught.value)
    assert not (root / "data" / "validate").exists()


def test_an_absent_suite_or_stage_before(root: Path) -> None:
    with pytest.raises(PleatError, match=r"data/ingest/b/manifest\.parquet is missing: .*run `dvc repro`\.$"):
        validate.run(load_params({"experiment.batches": ["b"]}), root)
    write_ingested(root, "b", ENOUGH)
    (root / validate.SUITE).unlink()
    with pytest.raises(PleatError, match="does not exist; restore it with `git checkout"):
        run(root)


def test_the_pages_stand_alone_and_hold_every_expectation(root: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    write_ingested(
        root, "b", [*ENOUGH, {"label": evil}], [{"source_path": evil, "label": "Hat", "reason": "missing file"}]
    )
    with (root / validate.SUITE).open("a") as file:
        file.write(entry("expect_column_values_to_be_in_set", column="label", value_set="[Hat]", severity="warning"))
    run(root, drop=["Skip"])
    folder = root / "reports" / "validation"
    assert names(folder) == ["index.html", "results.html", "suite.html"]
    pages = {name: (folder / name).read_text() for name in names(folder)}
    for name, page in pages.items():
        for rule in read_suite(root / validate.SUITE, ["label"]):
            assert rule.why in page, (name, rule.why)
        assert not re.search(
            r"""(src|href)=["']?(https?:)?//(?!greatexpectations\.io|docs\.greatexpectations)""", page
        ), name
        assert "<script" not in page
        assert evil not in page
        for target in re.findall(r'href="([^"#:]+)"', page):
            assert (folder / target).is_file(), (name, target)
    assert "&lt;script&gt;alert(1)" in pages["index.html"]
    assert "12 images of" not in pages["index.html"]
    assert "13 images of 3 classes" in pages["index.html"]
    for name in ("results.html", "suite.html"):
        assert "default-src 'none'" in pages[name], "a browser must not run or fetch anything"


def test_the_manifest_of_the_real_clothing_set(real_data: Path, clothing: Path) -> None:
    table = pd.read_csv(real_data / "data" / "clothing" / "images.csv", dtype=str, keep_default_na=False)
    on_disk = {path.stem for path in (real_data / "data" / "clothing" / "images").iterdir()}
    has_image = table["image"].isin(on_disk)
    counts = read_json(clothing / "data" / "validate" / "counts.json")
    for label in ("Not sure", "Other", "Skip"):
        spelled = table["label"].str.strip().str.lower() == label.lower()
        assert counts["dropped"][label] == {
            "samples": int((spelled & has_image).sum()),
            "rows_without_image": int((spelled & ~has_image).sum()),
        }
    assert counts["dropped"] == {
        "Not sure": {"samples": 228, "rows_without_image": 0},
        "Other": {"samples": 67, "rows_without_image": 0},
        "Others": {"samples": 0, "rows_without_image": 0},
        "Skip": {"samples": 7, "rows_without_image": 5},
    }
    assert counts["drop_matched_nothing"] == ["Others"]
    kept = table[has_image & ~table["label"].isin(["Not sure", "Other", "Skip"])]
    assert counts["samples"] == len(kept) == 5096
    assert counts["labels"] == {"label": dict(kept["label"].value_counts())}
    assert len(counts["labels"]["label"]) == 17
    assert counts["quarantine"] == {"no label": 358, "missing file": 5, "dropped label": 302}
    assert counts["warnings"] == []
    manifest = pd.read_parquet(clothing / "data" / "validate" / "manifest.parquet")
    assert sorted(Path(path).stem for path in manifest["source_path"]) == sorted(kept["image"])
    assert np.all(manifest[["width", "height"]].min(axis=1) >= 16)


def test_the_ten_most_frequent_classes_of_the_real_clothing_set(real_data: Path, clothing: Path, root: Path) -> None:
    (root / "data" / "ingest").symlink_to(clothing / "data" / "ingest")
    _, _, counts = run(root, drop=["Not sure", "Other", "Skip"], top_classes=10)
    before = read_json(clothing / "data" / "validate" / "counts.json")["labels"]["label"]
    assert counts["labels"]["label"] == dict(sorted(before.items(), key=lambda item: -item[1])[:10])
    assert counts["quarantine"]["not a top class"] == sum(before.values()) - counts["samples"] == 582
