"""What is found out about a delivery where samples have several labels, and the page that tells it."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, draw, encode, load_params
from inbox_help import put

from pipeline_steps import inbox_check, ingest
from pipeline_steps.drift import total_variation
from pipeline_steps.image_statistics import STATISTICS
from pipeline_steps.inbox_check import Check
from pipeline_steps.inbox_known import LeftOut
from pipeline_steps.pages.drift import drift_page

MULTICLASS = {"kind": "multiclass"}
OLD = {"red_hat": 12, "red_shoes": 6, "blue_hat": 6, "blue_shoes": 12, "blue_coat": 2}


def folders(counts: dict[str, int], first: int) -> dict[str, bytes]:
    """Drawn images in folders, `counts` in each: path to bytes."""
    paths = [f"{name}/{number}.jpg" for name, n in counts.items() for number in range(n)]
    return {path: encode(draw(first + seed)) for seed, path in enumerate(paths)}


@pytest.fixture(scope="module")
def apparel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose training data has colours and garments."""
    root = tmp_path_factory.mktemp("apparel")
    put(root / "data" / "expectations", {
        "manifest.yaml": (REPOSITORY / "data" / "expectations" / "manifest.yaml").read_bytes()
    })  # fmt: skip
    put(root / "data" / "raw" / "old", folders(OLD, 0))
    ingest.run(load_params({"experiment.batches": ["old"]}), "old", root)
    return root


def look(root: Path, work: Path, delivery: dict[str, int], **overrides: Any) -> tuple[Check, str]:
    """What `check` finds about a delivery, and the text of its page."""
    settings = load_params(
        {
            "experiment.batches": ["old"],
            "targets": {"colour": MULTICLASS, "garment": MULTICLASS},
            "inbox.max_drift.image_statistics": 1.0,
        }
        | {key.replace("__", "."): value for key, value in overrides.items()}
    )
    put(work / "data" / "raw" / "new", folders(delivery, 1000))
    found = inbox_check.check(settings, root, work, "new", work / "kept.parquet")
    left_out = LeftOut([], [], sum(delivery.values()))
    return found, re.sub(r"<[^>]*>", "", drift_page("new", "new", found, left_out, None))


def test_labels_are_compared_column_by_column(apparel: Path, tmp_path: Path) -> None:
    found, page = look(apparel, tmp_path, {"red_hat": 10, "red_shoes": 6, "green_hat": 2, "red_shirts": 3})
    colours, garments = {"red": 19, "green": 2}, {"hat": 12, "shoes": 6, "shirts": 3}
    assert found.labels["colour"].to_dict("index") == {
        "blue": {"training": 20, "delivery": 0},
        "red": {"training": 18, "delivery": 19},
        "green": {"training": 0, "delivery": 2},
    }
    assert found.labels["garment"]["delivery"].to_dict() == {"hat": 12, "shoes": 6, "coat": 0, "shirts": 3}
    of_labels = {distance.name: distance for distance in found.distances if distance.name not in STATISTICS}
    assert list(of_labels) == ["label shares of colour", "label shares of garment"]
    assert of_labels["label shares of colour"].distance == total_variation({"red": 18, "blue": 20}, colours)
    assert of_labels["label shares of garment"].distance == total_variation(
        {"hat": 18, "shoes": 18, "coat": 2}, garments
    )
    assert found.reasons == [
        "Labels of colour that the training data does not have: 'green' (2 images). Merge or drop them under `labels`, "
        "or allow them with inbox.max_drift.new_labels.",
        "Labels of garment that the training data does not have: 'shirts' (3 images). Merge or drop them under "
        "`labels`, or allow them with inbox.max_drift.new_labels.",
        "The label shares of colour differ by 0.53 from those of the training data (limit 0.5).",
    ]
    for words in ("of 2 labels of colour", "of 3 labels of garment", "Labels of colour", "Labels of garment",
                  "label shares of colour", "green new", "shirts new"):  # fmt: skip
        assert words in page, words
    assert "coat new" not in page


def test_a_single_label_column_is_not_named(apparel: Path, tmp_path: Path) -> None:
    found, page = look(apparel, tmp_path, {"red_hat": 10, "red_boots": 2}, targets={"garment": MULTICLASS})
    assert [distance.name for distance in found.distances] == ["label shares", *STATISTICS]
    assert found.reasons[0].startswith("Labels that the training data does not have: 'boots' (2 images")
    assert "garment" not in " ".join(found.reasons) + re.sub("(?s)Expectations.*", "", page)
    assert "of 2 labels" in page


def test_expectations_are_looked_at_for_each_label_column(apparel: Path, tmp_path: Path) -> None:
    found, _ = look(apparel, tmp_path, {"red_hat": 2, f"red_{'x' * 101}": 1}, inbox__max_drift__new_labels=True)
    assert len(found.reasons) == 1
    assert "on column 'garment' failed: a label has 1 to 100 characters; found 1 of 3 rows" in found.reasons[0]
    ruled = [outcome.rule.arguments().get("column") for outcome in found.outcomes]
    assert ruled.count("colour") == ruled.count("garment") == 3


def test_a_delivery_without_the_label_columns_is_set_aside(apparel: Path, tmp_path: Path) -> None:
    found, page = look(apparel, tmp_path, {"Hat": 3, "Shoes": 3})
    assert found.reasons == [
        "Target colour is read from the label column colour, but the batch new has label; correct `targets` in "
        "params.yaml, or take the batch off experiment.batches."
    ]
    assert "Set aside" in page


def test_top_classes_are_those_of_the_training_data_with_the_delivery(apparel: Path, tmp_path: Path) -> None:
    """A class that is rare in both is left out without a word about new labels; a frequent one may be new."""
    few = {"red_hat": 6, "blue_shoes": 6, "blue_coat": 3, "red_scarf": 2}
    found, _ = look(apparel, tmp_path / "few", few, labels__top_classes=2)
    assert found.reasons == []
    assert found.quarantine == {"not a top class": 5}
    assert found.labels["garment"].to_dict("index") == {
        "hat": {"training": 18, "delivery": 6}, "shoes": {"training": 18, "delivery": 6}
    }  # fmt: skip
    many = {"red_hat": 6, "red_scarf": 30}
    found, _ = look(apparel, tmp_path / "many", many, labels__top_classes=2, inbox__max_drift__label_shares=1.0)
    assert found.labels["garment"].to_dict("index") == {
        "hat": {"training": 18, "delivery": 6}, "scarf": {"training": 0, "delivery": 30}
    }  # fmt: skip
    assert [reason[:62] for reason in found.reasons] == [
        "Labels of garment that the training data does not have: 'scarf"
    ]
