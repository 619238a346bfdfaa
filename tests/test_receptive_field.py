"""Receptive fields against published figures and, of random small networks, against the region of non-zero gradient."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline_steps.complexity.field import Field
from pipeline_steps.complexity.trace import Trace, trace

SIDE = 161


def traced(name: str, size: int = 224) -> Trace:
    return trace(lambda: timm.create_model(name), (3, size, size))


@pytest.mark.parametrize(
    ("name", "pixels", "size"),
    # Araujo, Norris and Sim 2019; ResNet50 there has its strides in the 1 x 1 convolutions, timm's in the 3 x 3 ones.
    [("vgg16", 212, 224), ("mobilenetv1_100", 315, 224), ("resnet50", 427, 224), ("inception_v3", 1311, 299)],
)
def test_published_receptive_fields(name: str, pixels: int, size: int) -> None:
    found = traced(name, size)
    assert found.feature_map is not None
    assert found.feature_map[1].pixels == pixels
    assert found.feature_map[1].whole is None
    assert found.lost is None
    assert found.whole is not None  # global pooling, or a convolution over the whole map


def test_resnet50_with_its_strides_in_the_first_convolutions() -> None:
    def build() -> nn.Module:
        network = timm.create_model("resnet50")
        for stage in (network.layer2, network.layer3, network.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
        return network

    found = trace(build, (3, 224, 224)).feature_map
    assert found is not None
    assert found[1].pixels == 483


def test_convnext_tiny_by_the_formula() -> None:
    """Patches of 4, then stages of 3, 3, 9 and 3 kernels of 7, with kernels of 2 that halve the map between them."""
    pixels, jump = 4, 4
    for blocks in (3, 3, 9, 3):
        if jump > 4 or pixels > 4:
            pixels, jump = pixels + jump, 2 * jump
        pixels += blocks * 6 * jump
    found = traced("convnext_tiny").feature_map
    assert found is not None
    assert found[1].pixels == pixels == 1688


@pytest.mark.parametrize(
    ("name", "local", "first", "cause"),
    [
        ("efficientnet_b0", 851, "blocks.0.0.se", "global pooling"),  # squeeze-and-excitation
        ("vit_tiny_patch16_224", 16, "blocks.0.attn", "attention"),
        ("poolformer_s12", 431, "stages.0.blocks.0.norm1", "normalisation over positions"),
    ],
)
def test_what_sees_the_whole_image_is_marked(name: str, local: int, first: str, cause: str) -> None:
    found = traced(name)
    assert found.whole is not None
    assert found.feature_map is not None
    assert (found.whole[0], found.whole[1].whole) == (first, cause)
    assert found.feature_map[1].pixels == local


class Sum(nn.Module):
    """Branches that meet in a sum, or next to each other."""

    def __init__(self, branches: list[nn.Module], joined: bool) -> None:
        super().__init__()
        self.branches, self.joined = nn.ModuleList(branches), joined

    def forward(self, values: Tensor) -> Tensor:
        made = [branch(values) for branch in self.branches]
        return torch.cat(made, 1).mean(1, keepdim=True).expand(-1, 2, -1, -1) if self.joined else sum(made)  # type: ignore[return-value]


class Strided(nn.Module):
    """Every second row and column, from the given ones on."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, values: Tensor) -> Tensor:
        return values[:, :, self.first :: 2, 1::2].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def convolution(kernel: tuple[int, int], stride: int, dilation: int, same: bool) -> nn.Module:
    padding = tuple(dilation * (side // 2) for side in kernel) if same else (0, 0)
    return nn.Conv2d(2, 2, kernel, stride, padding, dilation)  # type: ignore[arg-type]


kernels = st.tuples(st.integers(1, 4), st.integers(1, 4))
windows = st.builds(convolution, kernels, st.integers(1, 2), st.integers(1, 2), st.booleans())
pools = st.builds(
    lambda kind, kernel, stride, padded: kind(kernel, stride, kernel // 2 if padded else 0),
    st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]), st.integers(2, 3), st.integers(1, 2), st.booleans(),
)  # fmt: skip
odd = st.sampled_from([1, 3, 5])
branches = st.builds(
    lambda sides, dilations, joined: Sum(
        [convolution((a, b), 1, dilation, True) for (a, b), dilation in zip(sides, dilations, strict=True)], joined
    ),
    st.lists(st.tuples(odd, odd), min_size=2, max_size=2), st.lists(st.integers(1, 3), min_size=2, max_size=2),
    st.booleans(),
)  # fmt: skip
uneven = st.builds(
    lambda before: nn.Sequential(nn.ZeroPad2d((before, 2 - before, 1, 0)), nn.Conv2d(2, 2, (2, 3))), st.integers(0, 2)
)
networks = st.lists(
    st.one_of(windows, branches, pools, uneven, st.builds(Strided, st.integers(0, 1))), min_size=1, max_size=4
)


def by_gradient(network: nn.Module) -> list[tuple[int, int]]:
    """First and last row and column that the output's middle position depends on.

    Weights are positive and maxima become sums over the same window, so that no gradient is cancelled or kept back.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
        if isinstance(module, nn.Sequential):
            for name, child in module.named_children():
                if isinstance(child, nn.MaxPool2d):
                    setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
    image = torch.rand(1, 2, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    output = network.double()(image)
    output[0, :, output.shape[2] // 2, output.shape[3] // 2].sum().backward()
    assert image.grad is not None
    touched = image.grad[0].sum(0) > 0
    return [(int(lines.nonzero().min()), int(lines.nonzero().max())) for lines in (touched.any(1), touched.any(0))]


def predicted(sees: Field) -> list[tuple[int, int]]:
    assert sees.rows is not None
    assert sees.columns is not None
    return [
        (reach.jump * (reach.size // 2) + reach.low, reach.jump * (reach.size // 2) + reach.high)
        for reach in (sees.rows, sees.columns)
    ]


@settings(max_examples=60, deadline=None)
@given(networks)
def test_random_networks_reach_as_far_as_their_gradient(parts: list[nn.Module]) -> None:
    network = nn.Sequential(*parts)
    found = trace(lambda: network, (2, SIDE, SIDE))
    assert found.feature_map is not None
    sees = found.feature_map[1]
    assert found.whole is None
    assert found.lost is None
    assert predicted(sees) == by_gradient(network)
