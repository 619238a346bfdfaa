"""Totals of parameters and multiply-accumulates against published and hand-counted figures."""

import pytest

from pipeline_steps.complexity.totals import count
from pipeline_steps.params import Block, CustomCnn, FrozenModel, Head

LINEAR = Head(hidden=0, dropout=0.0)


@pytest.mark.parametrize(
    ("backbone", "params", "giga_macs"),
    # Parameters as timm's own 1,000-class models; MACs as published by their authors.
    [("mobilenetv2_100", 3_504_872, 0.300), ("convnext_tiny", 28_589_128, 4.46), ("resnet50", 25_557_032, 4.09)],
)
def test_published_totals_with_the_original_classifier(backbone: str, params: int, giga_macs: float) -> None:
    totals = count(FrozenModel(kind="frozen", backbone=backbone, weights=None), LINEAR, n_classes=1000)
    assert totals["params"] == params
    assert totals["macs"] / 1e9 == pytest.approx(giga_macs, rel=0.01)
    assert totals["input_size"] == 224


def test_a_network_counted_by_hand() -> None:
    network = CustomCnn(
        kind="custom_cnn",
        input_size=20,
        blocks=[Block(filters=4, kernel=5, pool=2), Block(filters=6, kernel=3, pool=1)],
    )
    totals = count(network, Head(hidden=7, dropout=0.5), n_classes=3)
    convolutions = 5 * 5 * 3 * 4, 3 * 3 * 4 * 6  # weights, without bias
    batch_norms = 2 * 4 + 2 * 6
    head = 6 * 7 + 7 + 7 * 3 + 3
    assert totals["params"] == sum(convolutions) + batch_norms + head
    assert totals["macs"] == convolutions[0] * 20 * 20 + convolutions[1] * 10 * 10 + 6 * 7 + 7 * 3
