"""The effective receptive field against gradients by hand, what changes the field, and how times are attributed."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import REPOSITORY, load_params
from torch import Tensor, nn

from pipeline_steps import profile
from pipeline_steps.complexity import drawings, effective, latency, report, variations
from pipeline_steps.complexity.subject import RANDOM, Subject
from pipeline_steps.complexity.trace import trace
from pipeline_steps.errors import PleatError
from pipeline_steps.files import read_json

SAMPLE = REPOSITORY / "data" / "raw" / "sample"


def measured(network: nn.Module, size: int) -> effective.Effective:
    found = trace(lambda: network, (1, size, size)).local_output
    assert found is not None
    network = network.to_empty(device="cpu") if next(network.parameters()).is_meta else network
    for weight in network.parameters():
        nn.init.ones_(weight)
    images = torch.rand(3, 1, size, size)
    return effective.measure(network, found, images, list(images), "ones")


def test_one_convolution_of_ones_sees_its_window_evenly() -> None:
    found = measured(nn.Sequential(nn.Conv2d(1, 1, 5, padding=2, bias=False)), 11)
    wanted = np.zeros((11, 11))
    wanted[3:8, 3:8] = 1 / 25
    np.testing.assert_allclose(found.energy, wanted)
    assert (found.middle, found.theoretical_px) == ((5, 5), 5)
    assert found.area_px == {0.5: 13, 0.9: 23}
    assert found.side_px == {0.5: 5, 0.9: 5}


def test_stacked_convolutions_see_the_middle_best() -> None:
    """Two of 3 x 3 ones, the second with stride 2: the gradient along an axis is 1, 2, 3, 2, 1."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Conv2d(2, 1, 3, stride=2, bias=False))
    found = measured(network, 15)
    line = np.convolve([1, 1, 1], [1, 1, 1]) ** 2 / 19
    row = 2 * (6 // 2)
    wanted = np.zeros((15, 15))
    wanted[row : row + 5, row : row + 5] = np.outer(line, line)
    np.testing.assert_allclose(found.energy, wanted, atol=1e-12)
    assert (found.middle, found.theoretical_px) == ((row + 2, row + 2), 5)
    inner = np.outer(line[1:4], line[1:4]).sum()
    assert 0.5 < inner < 0.9  # so the square of 3 pixels holds the half
    assert found.side_px == {0.5: 3, 0.9: 5}


def test_a_middle_that_nothing_reaches_is_told() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU())
    found = trace(lambda: network, (1, 9, 9)).local_output
    assert found is not None
    nn.init.constant_(network[0].weight, -1.0)  # type: ignore[arg-type]
    nn.init.constant_(network[0].bias, -1.0)  # type: ignore[arg-type]
    images = torch.rand(1, 1, 9, 9)
    with pytest.raises(PleatError, match="No gradient comes back from the middle of 1"):
        effective.measure(network, found, images, list(images), "negative")


class Pair(nn.Module):
    """Gives its map twice."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(1, 1, 3, bias=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        made = self.mix(image) * 1
        return made, made


class PooledInside(nn.Module):
    """Writes into what a layer gave, and goes on with it outside of layers."""

    def __init__(self, layer: nn.Module, detached: bool = False) -> None:
        super().__init__()
        self.layer, self.detached = layer, detached

    def forward(self, image: Tensor) -> Tensor:
        made = self.layer(image.detach() if self.detached else image)
        made = made[0] if isinstance(made, tuple) else made
        return nn.functional.avg_pool2d(made.mul_(0), 2).mean((2, 3))


@pytest.mark.parametrize("layer", [Pair(), nn.Conv2d(1, 1, 3, bias=False)])
def test_the_field_is_that_of_the_last_output_of_a_layer(layer: nn.Module) -> None:
    network = PooledInside(layer)
    found = trace(lambda: network, (1, 9, 9))
    assert found.feature_map is not None
    assert found.feature_map[0] == ""  # the last local values are made between the layers
    assert found.local_output is not None
    assert found.local_output[0] == "layer"
    wanted = np.zeros((9, 9))
    wanted[3:6, 3:6] = 1 / 9  # as it was before the network wrote zeros into it
    energy = measured(network, 9).energy
    np.testing.assert_allclose(energy, wanted)


def test_a_network_that_gives_a_map_is_measured_at_its_output() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv2d(1, 1, 3, padding=1, bias=False)

        def forward(self, image: Tensor) -> Tensor:
            return self.mix(self.mix(image)) * 2

    found = measured(Twice(), 9)
    assert (found.layer, found.theoretical_px) == ("", 5)
    line = np.convolve([1, 1, 1], [1, 1, 1]) ** 2 / 19
    wanted = np.zeros((9, 9))
    wanted[2:7, 2:7] = np.outer(line, line)
    np.testing.assert_allclose(found.energy, wanted, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "layer", "pixels"),
    [
        ("swin_tiny_patch4_window7_224", "layers.0.blocks.1", 4),  # patches of 4; the rest is attention
        ("pit_ti_224", "patch_embed.conv", 16),
        ("deit3_small_patch16_224", "patch_embed.proj", 16),
    ],
)
def test_where_the_last_local_values_are_no_layers_output(name: str, layer: str, pixels: int) -> None:
    """The square of the theoretical field holds the energy, so the right position was taken."""
    torch.manual_seed(0)
    network = timm.create_model(name).eval()
    found = trace(lambda: timm.create_model(name), (3, 224, 224)).local_output
    assert found is not None
    images = torch.rand(1, 3, 224, 224)
    seen = effective.measure(network, found, images, list(images), "random")
    assert (seen.layer, seen.theoretical_px) == (layer, pixels)
    assert seen.side_px[0.9] <= pixels


def test_a_network_that_lets_no_gradient_through_is_told() -> None:
    with pytest.raises(effective.NoEffectiveFieldError, match="No gradient comes back from the middle of layer"):
        measured(PooledInside(nn.Conv2d(1, 1, 3), detached=True), 9)


def test_a_network_without_a_local_output_is_told(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 9 * 9, 2))
    see = lambda _: torch.zeros(3, 9, 9, dtype=torch.uint8)  # noqa: E731
    given = Subject("dense", 9, "", lambda: network, lambda _: (network, RANDOM), see, lambda pixels: pixels)
    with pytest.raises(effective.NoEffectiveFieldError, match=r"^dense has no layer .* field to measure\.$"):
        report.make(given, images={"one": b""})


def test_a_field_of_a_few_pixels_of_a_large_image_is_drawn(tmp_path: Path) -> None:
    found = measured(nn.Sequential(nn.Conv2d(1, 1, 3, bias=False)), 64)
    assert np.quantile(found.energy, 0.995) == 0
    drawings.effective(tmp_path / "field.png", "small", found)
    assert (tmp_path / "field.png").exists()


def test_on_images_of_a_folder(tmp_path: Path) -> None:
    params = load_params({})
    folder = profile.show(["cnn_tiny"], params, images=SAMPLE, root=tmp_path)
    page = (folder / "index.html").read_text()
    assert "random weights, on 16 images" in page
    assert (folder / "effective_0.png").exists()
    assert str(SAMPLE) not in page
    (tmp_path / "empty").mkdir()
    with pytest.raises(PleatError, match="holds no image"):
        profile.show(["cnn_tiny"], params, images=tmp_path / "empty", root=tmp_path)
    (tmp_path / "empty" / "torn.jpg").write_bytes(b"\xff\xd8 no image")
    with pytest.raises(PleatError, match=r"torn.jpg cannot be read as an image"):
        profile.show(["cnn_tiny"], params, images=tmp_path / "empty", root=tmp_path)
    with pytest.raises(PleatError, match="is for the effective receptive field of one model"):
        profile.show(["cnn_tiny"], params, weights=tmp_path / "w.safetensors", root=tmp_path)


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.AdaptiveAvgPool2d(1),
    )  # fmt: skip


def test_what_changes_the_field_by_hand() -> None:
    """r0 = sum((k - 1) * product of the strides before) + 1, for each change."""
    found = variations.table(plain, (3, 32, 32)).set_index("change")
    fields = found["receptive_field_px"].tolist()
    as_it_is = 1 + 2 + 2 + 2 + 2 + 2 * 2
    assert fields == [
        as_it_is,
        as_it_is + 2 + 2 + 2 + 2 * 2,  # the four kernels with stride 1
        as_it_is - 2,  # the last kernel lies on pixels once more
        as_it_is - 2,
        as_it_is + 2,
    ]
    assert found["map"].tolist() == [16, 16, 32, 16, 16]
    assert found["params"].diff().iloc[-1] == 2 * (8 * 8 * 9 + 8)  # one block twice, against none


class PooledHead(nn.Module):
    """The last local values are made in a layer that gives none."""

    def forward(self, values: Tensor) -> Tensor:
        return nn.functional.relu(values).mean((2, 3))


class SharedActivation(nn.Module):
    """One module after each of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.act = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU()

    def forward(self, image: Tensor) -> Tensor:
        return self.act(self.two(self.act(self.one(image)))).mean((2, 3))


@pytest.mark.parametrize(
    "build", [lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), PooledHead()), SharedActivation]
)
def test_the_first_row_of_the_changes_is_the_field_of_the_report(build: Callable[[], nn.Module]) -> None:
    found = trace(build, (3, 16, 16)).feature_map
    assert found is not None
    assert found[1].pixels == 5
    assert variations.table(build, (3, 16, 16))["receptive_field_px"].tolist()[:2] == [5, 9]


@pytest.mark.parametrize(("padding", "side"), [(1, 16), ("same", 16), ("valid", 10)])
def test_larger_kernels_keep_the_size_of_the_map_whatever_they_pad_with(padding: int | str, side: int) -> None:
    def build() -> nn.Module:
        return nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=padding, padding_mode="reflect") for _ in range(3)))

    found = variations.table(build, (3, 16, 16)).set_index("change")
    larger = found.loc["kernels of 3 x 3 made 5 x 5 (those with stride 1)"]
    assert (larger["receptive_field_px"], found["receptive_field_px"].iloc[0]) == (13, 7)
    assert found["map"].iloc[0] == side
    assert larger["map"] == (side if padding != "valid" else 16 - 3 * 4)


class Slow(nn.Module):
    def __init__(self, seconds: float, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.seconds, self.inner = seconds, inner

    def forward(self, values: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.inner(values) if self.inner else values


def test_a_layers_time_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "BUDGET_S", 0.3)
    found = latency._of_batch(Slow(0.01, Slow(0.05)), torch.zeros(2, 3, 4, 4))
    assert (found.batch, found.threads) == (2, torch.get_num_threads())
    assert found.quartiles_ms[0] <= found.median_ms <= found.quartiles_ms[1]
    assert found.median_ms >= 60
    assert found.layers_ms["inner"] >= 50
    assert 10 <= found.layers_ms[""] < found.layers_ms["inner"]


def test_the_time_of_a_module_made_on_the_way_is_that_of_the_one_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Makes(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return Slow(0.03)(values)  # type: ignore[no-any-return]

    monkeypatch.setattr(latency, "BUDGET_S", 0.1)
    found = latency._of_batch(nn.Sequential(Makes()), torch.zeros(2, 3, 4, 4))
    assert found.layers_ms["0"] >= 30
    assert found.layers_ms[""] < 30


def test_times_and_peaks_of_a_small_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(latency, "BUDGET_S", 0.1)
    folder = profile.show(["cnn_tiny"], load_params({}), timed=True, root=tmp_path)
    found = read_json(folder / "totals.json")["cnn_tiny"]
    assert found["latency_ms_cpu_32"] > found["latency_ms_cpu_1"] > 0
    page = (folder / "index.html").read_text()
    assert "The ten most expensive layers, batch of 32" in page
    assert (folder / "roofline_0.png").exists()
