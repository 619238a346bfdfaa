"""Totals of parameters and multiply-accumulates against published and hand-counted figures."""

from pathlib import Path

import pytest
import synthetic_run as synthetic
from conftest import load_params

from pipeline_steps import profile
from pipeline_steps.complexity.totals import count
from pipeline_steps.files import read_json
from pipeline_steps.params_models import Block, CustomCnn, FrozenModel, Head

LINEAR = Head(hidden=0, dropout=0.0)


@pytest.mark.parametrize(
    ("backbone", "params", "giga_macs"),
    # Parameters as timm's own 1,000-class models; MACs as published by their authors.
    [("mobilenetv2_100", 3_504_872, 0.300), ("convnext_tiny", 28_589_128, 4.46), ("resnet50", 25_557_032, 4.09)],
)
def test_published_totals_with_the_original_classifier(backbone: str, params: int, giga_macs: float) -> None:
    totals = count(FrozenModel(kind="frozen", backbone=backbone, weights=None), LINEAR, n_outputs=1000)
    assert totals["params"] == params
    assert totals["macs"] / 1e9 == pytest.approx(giga_macs, rel=0.01)
    assert totals["input_size"] == 224


def test_a_network_counted_by_hand() -> None:
    network = CustomCnn(
        kind="custom_cnn",
        input_size=20,
        blocks=[Block(filters=4, kernel=5, pool=2), Block(filters=6, kernel=3, pool=1)],
    )
    totals = count(network, Head(hidden=7, dropout=0.5), n_outputs=3)
    convolutions = 5 * 5 * 3 * 4, 3 * 3 * 4 * 6  # weights, without bias
    batch_norms = 2 * 4 + 2 * 6
    head = 6 * 7 + 7 + 7 * 3 + 3
    assert totals["params"] == sum(convolutions) + batch_norms + head
    assert totals["macs"] == convolutions[0] * 20 * 20 + convolutions[1] * 10 * 10 + 6 * 7 + 7 * 3


@pytest.mark.parametrize(
    ("columns", "targets", "n_outputs"),
    [
        (synthetic.LABEL, synthetic.ONE, 6),
        (synthetic.APPAREL, synthetic.TWO, 6 + 4),
        (synthetic.TAGS, synthetic.MANY, 4 + 3 + 2),
    ],
    ids=["one", "two", "multilabel"],
)
def test_the_head_has_an_output_for_each_class_of_each_target(
    tmp_path: Path, columns: dict, targets: dict, n_outputs: int
) -> None:
    synthetic.make_data(tmp_path, columns)
    params = load_params({"targets": targets})
    wanted = count(params.models["cnn_tiny"], params.training["cnn_tiny"].head, n_outputs)
    assert profile.run(params, "cnn_tiny", tmp_path) == wanted
    assert read_json(tmp_path / "data" / "profile" / "cnn_tiny.json") == wanted
