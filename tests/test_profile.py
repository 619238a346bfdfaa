"""Totals of parameters and multiply-accumulates against published and hand-counted figures."""

from pathlib import Path

import pytest
import synthetic_run as synthetic
from conftest import load_params

from pipeline_steps import profile
from pipeline_steps.complexity.totals import count
from pipeline_steps.errors import PleatError
from pipeline_steps.files import read_json
from pipeline_steps.params_models import Block, CustomCnn, FinetunedModel, FrozenModel, Head, ScratchModel

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


def test_the_study_counts_a_head_on_the_logits_of_convnext_large() -> None:
    """197,767,336 of timm's network with its 1,000 classes, and 1,000 x 26 + 26 of the head."""
    settings = FrozenModel(kind="frozen", backbone="convnext_large.fb_in22k_ft_in1k", weights=None, head_on="logits")
    assert count(settings, LINEAR, n_outputs=26)["params"] == 197_793_362


def test_whole_networks_count_as_timms_own_at_the_chosen_size() -> None:
    """With 1,000 classes timm's 3,504,872 parameters; the multiply-accumulates of convolutions follow the area."""
    finetuned = FinetunedModel(kind="finetuned", backbone="mobilenetv2_100", weights="not needed", input_size=448)
    own = count(ScratchModel(kind="scratch", backbone="mobilenetv2_100"), LINEAR, 1000)
    large = count(finetuned, LINEAR, 1000)
    assert own["params"] == large["params"] == 3_504_872
    assert (own["input_size"], large["input_size"]) == (224, 448)
    head = 1280 * 1000
    assert large["macs"] - head == 4 * (own["macs"] - head)
    on_logits = count(finetuned.model_copy(update={"head_on": "logits"}), LINEAR, 5)
    assert on_logits["params"] == 3_504_872 + 5 * 1000 + 5


def test_a_size_that_a_network_cannot_take_is_told_in_the_profile() -> None:
    with pytest.raises(PleatError, match=r"vgg11 cannot take images of 16 pixels .* Its own size is 224"):
        count(ScratchModel(kind="scratch", backbone="vgg11", input_size=16), LINEAR, 3)


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

    valid = [Block(filters=4, kernel=5, pool=2, padding="valid"), *network.blocks[1:]]
    changed = network.model_copy(update={"blocks": valid, "batch_norm": False})
    totals = count(changed, Head(hidden=7, dropout=0.5), n_outputs=3)
    assert totals["params"] == sum(convolutions) + 4 + 6 + head
    assert totals["macs"] == convolutions[0] * 16 * 16 + convolutions[1] * 8 * 8 + 6 * 7 + 7 * 3


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
