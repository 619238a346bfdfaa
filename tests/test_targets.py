"""Targets: which columns they read, their classes and codes; scikit-learn's encoders as oracle."""

import numpy as np
import pandas as pd
import pytest
from sklearn.preprocessing import LabelEncoder, MultiLabelBinarizer

from pipeline_steps import targets
from pipeline_steps.errors import PleatError
from pipeline_steps.params import Multiclass, Multilabel

COLOUR, GARMENT = Multiclass(kind="multiclass"), Multiclass(kind="multiclass")
TAGS = Multilabel(kind="multilabel", of=["colour", "garment"])


@pytest.fixture
def rows() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {"colour": rng.choice(["red", "blue", "é"], 40), "garment": rng.choice(["shirt", "Dress", "NA"], 40)}
    )


def test_codes_are_those_of_scikit_learn(rows: pd.DataFrame) -> None:
    colour, tags = targets.of({"colour": COLOUR, "tags": TAGS}, rows)
    encoder = LabelEncoder().fit(rows["colour"])
    assert colour.classes == encoder.classes_.tolist()
    assert colour.codes(rows).tolist() == encoder.transform(rows["colour"]).tolist()
    binarizer = MultiLabelBinarizer().fit(rows.to_numpy())
    assert tags.classes == binarizer.classes_.tolist()
    assert tags.codes(rows).tolist() == binarizer.transform(rows.to_numpy()).tolist()
    assert colour.labels(rows).tolist() == rows["colour"].tolist()
    assert tags.labels(rows).tolist() == [list(found) for found in map(sorted, rows.to_numpy().tolist())]


def test_each_column_is_named_once() -> None:
    assert targets.label_columns({"garment": GARMENT, "tags": TAGS}) == ["garment", "colour"]


def test_codes_of_no_rows_have_the_usual_shape(rows: pd.DataFrame) -> None:
    colour, tags = targets.of({"colour": COLOUR, "tags": TAGS}, rows)
    assert colour.codes(rows.iloc[:0]).shape == (0,)
    assert tags.codes(rows.iloc[:0]).shape == (0, 6)


def test_a_label_that_is_no_class_is_named(rows: pd.DataFrame) -> None:
    [colour] = targets.of({"colour": COLOUR}, rows)
    with pytest.raises(PleatError, match=r"Target colour has no class green; its classes are blue, red, é\."):
        colour.codes(pd.DataFrame({"colour": ["red", "green"]}))


def test_columns_that_share_a_class_cannot_be_joined() -> None:
    rows = pd.DataFrame({"colour": ["none", "red"], "garment": ["shirt", "none"]})
    with pytest.raises(PleatError, match="joins the columns colour and garment, but both have the class 'none'"):
        targets.of({"tags": TAGS}, rows)
    assert [target.classes for target in targets.of({"colour": COLOUR, "garment": GARMENT}, rows)] == [
        ["none", "red"],
        ["none", "shirt"],
    ]


def test_a_multilabel_target_of_one_class_is_refused() -> None:
    tags = Multilabel(kind="multilabel", of=["colour"])
    with pytest.raises(PleatError, match=r"Target tags has only the class red; it needs at least two\."):
        targets.of({"tags": tags}, pd.DataFrame({"colour": ["red", "red"]}))
