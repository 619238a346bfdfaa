"""Costs of layers against published and hand-counted figures, and against torch's own count."""

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline_steps.complexity import layers
from pipeline_steps.complexity.subject import of_timm
from pipeline_steps.complexity.trace import trace
from pipeline_steps.errors import PleatError


def profile(network: nn.Module, *shape: int) -> pd.DataFrame:
    return layers.table(trace(lambda: network.to(torch.empty(0).device), shape))  # type: ignore[arg-type]


def profile_timm(name: str) -> pd.DataFrame:
    subject = of_timm(name)
    table = layers.table(trace(subject.build, subject.shape))
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), counter:
        subject.build().eval().requires_grad_(False)(torch.zeros(1, *subject.shape))
    assert counter.get_total_flops() == 2 * table["macs_torch"].sum()
    return table


@pytest.mark.parametrize(
    ("name", "params", "giga_macs"),
    # As published by the authors, with the original classifiers; Inception at 299 pixels.
    [
        ("resnet50", 25_557_032, 4.09),
        ("convnext_tiny", 28_589_128, 4.46),
        ("mobilenetv2_100", 3_504_872, 0.301),
        ("inception_v3", 23_834_568, 5.7),
        ("vgg16", 138_357_544, 15.5),
        ("vit_base_patch16_224", 86_567_656, 17.6),
        ("coat_lite_tiny", 5_721_960, 1.6),  # modules that several others share
        ("swin_tiny_patch4_window7_224", 28_288_354, 4.5),
    ],
)
def test_published_figures_by_two_counts(name: str, params: int, giga_macs: float) -> None:
    table = profile_timm(name)
    found = layers.totals(table)
    assert found["params"] == params
    assert found["macs"] / 1e9 == pytest.approx(giga_macs, rel=0.01)
    assert layers.differences(table).empty  # layer by layer
    parts = layers.parts(table)
    assert parts["macs"].sum() == found["macs"]
    assert parts["params"].sum() == params


def test_convnext_tiny_to_the_last_operation() -> None:
    """The studies' row, by hand in docs/complexity.md: 4,456 million multiply-accumulates, 8,911 million FLOPs."""
    found = layers.totals(profile_timm("convnext_tiny"))
    wanted = {"params": 28_589_128, "macs": 4_455_531_264, "flops": 8_911_062_528}
    assert {name: found[name] for name in wanted} == wanted


def test_convolutions_of_the_studies() -> None:
    """A 5 x 5 convolution 64 to 64 giving 220 x 220, and a 7 x 7 one 3 to 64 giving 115 x 115."""
    (row,) = profile(nn.Conv2d(64, 64, 5), 64, 224, 224).to_dict("records")
    assert row["macs"] == 4_956_160_000
    assert (row["input_shape"], row["output_shape"], row["kernel"]) == ("64x224x224", "64x220x220", "5x5")
    (row,) = profile(nn.Conv2d(3, 64, 7, stride=2, padding=6), 3, 224, 224).to_dict("records")
    assert row["macs"] == 124_420_800
    assert (row["output_shape"], row["stride"], row["groups"]) == ("64x115x115", "2x2", "1")


def test_a_small_network_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(72, 5),
    )  # fmt: skip
    table = profile(network, 4, 6, 6).set_index("layer")
    assert table["macs"].to_dict() == {"0": 8 * 36 * 2 * 9, "1": 0, "2": 0, "3": 0, "5": 360}
    assert table["flops"].to_dict() == {"0": 10_368, "1": 0, "2": 0, "3": 0, "5": 720}
    assert table["share"]["0"] == pytest.approx(10_368 / 11_088)
    assert table["share"]["5"] == pytest.approx(720 / 11_088)
    assert table["params"].to_dict() == {"0": 8 * 2 * 9 + 8, "1": 16, "2": 0, "3": 0, "5": 365}
    assert table["normalisation_ops"].to_dict() == {"0": 0, "1": 2 * 288, "2": 0, "3": 0, "5": 0}
    assert table["activation_ops"].sum() == table["activation_ops"]["2"] == 288
    assert table["pooling_ops"].sum() == table["pooling_ops"]["3"] == 4 * 72
    assert table["elementwise_ops"].sum() == 0
    # The convolution reads 4 x 36 values and 152 weights and writes 8 x 36.
    assert table["bytes_moved"]["0"] == 4 * (144 + 152 + 288)
    assert table["flops_per_byte"]["0"] == pytest.approx(2 * 8 * 36 * 18 / (4 * 584))
    assert table["bytes_moved"]["2"] == 4 * 2 * 288
    assert table["bytes_moved"]["5"] == 4 * (72 + 365 + 5)


class Functional(nn.Module):
    """Everything outside of layers: einsum, matmul, attention, a convolution, an addition, its own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.weight = nn.Parameter(torch.ones(6, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        tokens = nn.functional.conv2d(image, self.weight).flatten(2).transpose(1, 2) * self.scale
        tokens = tokens + nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        scores = torch.einsum("bic,bjc->bij", tokens, tokens)
        return scores @ tokens


def test_what_happens_outside_of_layers_is_counted_at_the_module_around_it() -> None:
    n, width = 25, 6
    table = profile(Functional(), 3, 5, 5).set_index("layer")
    own = n * 3 * width + 2 * n * n * width + n * n * width + n * n * width
    attention = 4 * n * width * width + 2 * n * n * width
    assert table["macs"].to_dict() == {"(network)": own, "attention": attention}
    assert table["params"].to_dict() == {"(network)": width + 18, "attention": 4 * width * width + 4 * width}
    assert (table["macs"] == table["macs_torch"]).all()
    assert table["whole_image"]["attention"]
    # 1 scaling, 2 additions; softmax of the fused attention.
    assert table["elementwise_ops"]["(network)"] == 3 * n * width
    assert table["activation_ops"]["(network)"] == 5 * n * n


class Twice(nn.Linear):
    """A layer whose kind promises less than it does."""

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(super().forward(values))


def test_a_difference_of_the_two_counts_is_shown() -> None:
    table = profile(nn.Sequential(nn.Flatten(), Twice(12, 12)), 3, 2, 2)
    (row,) = layers.differences(table).to_dict("records")
    assert (row["layer"], row["kind"], row["macs"], row["macs_torch"]) == ("1", "Twice", 144, 288)


class Spectrum(nn.Module):
    """A layer of an unknown kind."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.fft.fft2(image).abs()


def test_an_unknown_layer_is_listed_as_not_counted() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Spectrum(), nn.Conv2d(4, 4, 3))
    found = trace(lambda: network, (3, 9, 9))
    assert "_fft_c2c in 1" in found.notes[0]
    assert found.notes[0].startswith("Not counted")
    table = layers.table(found).set_index("layer")
    assert table["not_counted"]["1"]
    assert not table["not_counted"][["0", "2"]].any()
    assert table["receptive_field_px"].isna().to_dict() == {"0": False, "1": True, "2": True}
    assert found.lost is not None
    assert found.lost[0] == "1"


def test_sizes_and_names_that_cannot_be() -> None:
    with pytest.raises(PleatError, match=r"cannot take images of 4 x 4 pixels"):
        profile(nn.Sequential(nn.Conv2d(3, 4, 5)), 3, 4, 4)
    with pytest.raises(PleatError, match=r"vgg16 cannot take images of 16 pixels .* Its own size is 224"):
        of_timm("vgg16", 16)
    with pytest.raises(PleatError, match=r"no model named 'convnext_tinny'; near names: .*convnext_tiny"):
        of_timm("convnext_tinny")


def test_a_layer_called_twice_is_one_row_with_its_weights_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, image: Tensor) -> Tensor:
            return self.mix(self.mix(image))

    (row,) = profile(Shared(), 3, 8, 8).to_dict("records")
    assert (row["layer"], row["calls"], row["params"], row["macs"]) == ("mix", 2, 84, 2 * 64 * 81)
    assert (row["receptive_field_px"], row["macs_torch"]) == (5, row["macs"])
