"""Networks that are hard to count: those that need values, write in place, call by keyword, or cannot be counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import draw, encode, load_params
from torch import Tensor, nn

from pipeline_steps import profile
from pipeline_steps.complexity import layers, operations, report
from pipeline_steps.complexity.subject import RANDOM, Subject
from pipeline_steps.complexity.trace import trace
from pipeline_steps.errors import PleatError


class Given(nn.Module):
    """Modules by name, and what is done with them."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, image: Tensor) -> Any:
        return self.run(self, image)


def subject(build: Callable[[], nn.Module], size: int = 9) -> Subject:
    def see(_: bytes) -> Tensor:
        return torch.arange(3 * size * size).reshape(3, size, size).to(torch.uint8)

    return Subject("given", size, "a network", build, lambda _: (build(), RANDOM), see, lambda pixels: pixels / 255)


class Undecided(nn.Module):
    """Takes one of two ways by the values of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.bright, self.dark = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.bright(image) if image.mean() > 0.1 else self.dark(image)


class MadeOfValues(nn.Module):
    """Reads values while it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        self.bright = nn.Conv2d(3, 4, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.bright(image)


@pytest.mark.parametrize("build", [Undecided, MadeOfValues])
def test_a_network_that_needs_values_is_counted_on_one_path_and_the_report_says_why(
    build: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = report.make(subject(build), images={"one.png": encode(draw(0), "PNG")})
    assert made.totals["macs"] == 4 * 49 * 27
    assert "Tensor.item() cannot be called on meta tensors" in made.trace.notes[0]
    assert made.changes["change"].iloc[0] == "as it is"
    assert made.effective is not None
    monkeypatch.setattr(profile, "_subject", lambda *_: subject(build))
    page = (profile.show(["given"], load_params({}), root=tmp_path) / "index.html").read_text()
    assert "cannot be counted without values (" in page
    assert "decides by the values of the pixels" not in page


def test_a_layer_that_is_called_by_keyword_is_profiled() -> None:
    made = report.make(subject(lambda: Given(lambda self, image: self.mix(input=image), mix=nn.Conv2d(3, 4, 3))))
    assert made.totals["macs"] == 4 * 49 * 27
    assert made.changes["change"].iloc[0] == "as it is"


def test_a_network_that_does_nothing_is_one_row(tmp_path: Path) -> None:
    made = report.make(subject(nn.Identity))
    assert made.table["layer"].tolist() == ["(network)"]
    assert (made.totals["macs"], made.totals["params"], made.totals["bytes_moved"]) == (0, 0, 0)
    report.write(tmp_path / "report", [made])
    assert (tmp_path / "report" / "index.html").exists()


def test_an_error_of_the_count_is_not_told_as_one_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> int:
        raise IndexError("meta")

    monkeypatch.setattr(operations, "macs", fails)
    with pytest.raises(
        PleatError, match=r"The count of convolution in mix failed \(IndexError: meta\); this is a defect"
    ):
        trace(lambda: Given(lambda self, image: self.mix(image), mix=nn.Conv2d(3, 4, 3)), (3, 9, 9))


def test_what_depends_on_a_lost_field_is_told() -> None:
    def run(self: Any, image: Tensor) -> Tensor:
        return self.after(torch.fft.fft2(self.before(image)).abs())

    made = report.make(subject(lambda: Given(run, before=nn.Conv2d(3, 4, 3), after=nn.Conv2d(4, 4, 3))))
    assert any("it is missing for all that depends on it." in sentence for sentence in made.sentences())


def wide(n: int = 4) -> nn.Conv2d:
    return nn.Conv2d(n, n, 3, padding=1)


def written_slice(self: Any, image: Tensor) -> Tensor:
    image = self.first(image)
    image[:, :2] = self.part(image[:, :2])
    return self.last(image)


def added_to_slice(self: Any, image: Tensor) -> Tensor:
    image = self.first(image)
    image[:, :2] += self.part(image[:, :2])
    return self.last(image)


def filled_zeros(self: Any, image: Tensor) -> Tensor:
    image = self.first(image)
    made = torch.zeros_like(image)
    made[:, :2] = self.part(image[:, :2])
    made[:, 2:] = image[:, 2:]
    return self.last(made)


def filled_new(self: Any, image: Tensor) -> Tensor:
    image = self.first(image)
    made = image.new_empty(image.shape)
    made[:, :2] = self.part(image[:, :2])
    return self.last(made)


@pytest.mark.parametrize("run", [written_slice, added_to_slice, filled_zeros, filled_new])
def test_a_map_that_was_written_into_in_part_has_no_known_field(run: Callable[[Any, Tensor], Tensor]) -> None:
    found = trace(lambda: Given(run, first=wide(), part=wide(2), last=wide()), (4, 9, 9))
    assert found.lost is not None
    assert (found.lost[0], found.lost[1].lost) == ("", "written into in part")
    table = layers.table(found).set_index("layer")
    assert table["receptive_field_px"].isna().to_dict() == {
        "first": False,
        "part": False,
        "(network)": True,
        "last": True,
    }
    assert found.notes == []


def test_a_copy_takes_the_field_of_what_is_copied() -> None:
    def run(self: Any, image: Tensor) -> Tensor:
        image = self.first(image)
        image.copy_(self.part(image))
        return self.last(image)

    found = trace(lambda: Given(run, first=wide(), part=wide(), last=nn.Conv2d(4, 4, 1)), (4, 9, 9))
    assert found.lost is None
    assert layers.table(found).set_index("layer")["receptive_field_px"]["last"] == 5


@pytest.mark.parametrize(
    "write",
    [
        lambda image: image[:, :2].relu_(),
        lambda image: image[:, :2].mul_(2),
        lambda image: image.zero_(),
        lambda image: image.transpose_(2, 3).add_(1).transpose_(2, 3),
        lambda image: image[:, :2].copy_(image[:, 2:]),
    ],
)
def test_writing_what_depends_on_the_same_pixels_loses_nothing(write: Callable[[Tensor], Tensor]) -> None:
    def run(self: Any, image: Tensor) -> Tensor:
        image = self.first(image)
        write(image)
        return self.last(image)

    found = trace(lambda: Given(run, first=wide(), last=wide()), (4, 9, 9))
    assert found.lost is None
    assert layers.table(found)["receptive_field_px"].iloc[-1] == 5


def test_circular_padding_is_lost_but_counted() -> None:
    found = trace(lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), (4, 9, 9))
    assert found.notes == []
    assert found.lost is not None
    assert found.lost[1].lost == "written into in part"
    assert layers.table(found)["macs"].tolist() == [4 * 81 * 36]


def test_other_strides_over_the_same_memory_are_not_followed() -> None:
    def run(self: Any, image: Tensor) -> Tensor:
        return self.mix(image.as_strided((1, 3, 4, 4), (243, 81, 18, 2)))

    found = trace(lambda: Given(run, mix=nn.Conv2d(3, 4, 3)), (3, 9, 9))
    assert layers.table(found)["receptive_field_px"].isna().all()
    assert found.lost is not None
    assert found.lost[1].lost == "as_strided"


def table(build: Callable[[], nn.Module], *shape: int) -> pd.DataFrame:
    return layers.table(trace(build, shape)).set_index("layer")  # type: ignore[arg-type]


def test_tied_weights_count_once() -> None:
    def build() -> nn.Module:
        first, second = wide(), wide()
        second.weight = first.weight
        return nn.Sequential(first, second)

    found = table(build, 4, 9, 9)
    assert found["params"].to_dict() == {"0": 144 + 4, "1": 4}


def test_a_transposed_convolution_called_by_keyword() -> None:
    found = table(
        lambda: Given(lambda self, image: self.wide(input=image), wide=nn.ConvTranspose2d(4, 6, 3, stride=2)), 4, 8, 8
    )
    assert found["macs"].to_dict() == found["macs_torch"].to_dict() == {"wide": 4 * 64 * 6 * 9}


@pytest.mark.parametrize("on_meta", [True, False])
def test_attention_inside_of_torchs_layer_is_one_operation(on_meta: bool) -> None:
    """Its scores, 25 x 25 for each of 2 heads, are neither written nor scaled one by one."""

    def run(self: Any, image: Tensor) -> Tensor:
        tokens = image.flatten(2).transpose(1, 2)
        if not on_meta:
            image.mean().item()
        return self.attend(tokens, tokens, tokens, need_weights=False)[0]

    def build() -> nn.Module:
        return Given(run, attend=nn.MultiheadAttention(8, 2, batch_first=True))

    n, width = 25, 8
    found = table(build, 8, 5, 5).loc["attend"]
    assert found["macs"] == found["macs_torch"] == 4 * n * width * width + 2 * n * n * width
    assert found["activation_ops"] == 5 * 2 * n * n
    assert found["value_bytes"] < 4 * 4 * 2 * n * n  # less than to write and read the scores twice
    assert found["whole_image"] == "attention"
    assert found["not_counted"] == ""
    assert nn.functional.scaled_dot_product_attention.__module__ != "pipeline_steps.complexity.recorder"


def test_a_module_made_on_the_way_belongs_to_the_one_around_it() -> None:
    def run(self: Any, image: Tensor) -> Tensor:
        return nn.AvgPool2d(2)(self.mix(image) * 2) + 1

    network = nn.Sequential(Given(run, mix=nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 1))
    found = table(lambda: network, 3, 10, 10).loc["0"]
    assert (found["kind"], found["calls"], found["kernel"]) == ("Given", 1, "")
    assert (found["input_shape"], found["output_shape"]) == ("3x10x10", "4x4x4")
    assert (found["pooling_ops"], found["elementwise_ops"]) == (4 * 16 * 4, 4 * 64 + 4 * 16)
    assert found["receptive_field_px"] == 4


def test_statistics_of_the_image_itself_count_five_a_value() -> None:
    network = nn.Sequential(
        nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False), nn.InstanceNorm2d(4), nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, track_running_stats=True),
    )  # fmt: skip
    found = table(lambda: network, 4, 9, 9)
    assert (found["normalisation_ops"] / (4 * 81)).tolist() == [2, 5, 5, 5, 2]


def test_the_most_of_all_channels_keep_their_field() -> None:
    def run(self: Any, image: Tensor) -> Tensor:
        return self.mix(image.topk(2, 1)[0])

    assert table(lambda: Given(run, mix=nn.Conv2d(2, 4, 3)), 3, 9, 9)["receptive_field_px"]["mix"] == 3
    brightest_row = Given(lambda _, image: image.topk(1, 2)[0].mean(1))
    assert table(lambda: brightest_row, 3, 9, 9)["whole_image"].tolist() == ["global pooling"]


class Block(nn.Module):
    """Has the names of a window's settings, which mean something else here."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.groups = 7, 2.5, "none"
        self.mix = nn.Conv2d(3, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        return image + self.mix(image)


def test_kernels_and_strides_are_those_of_windows_only() -> None:
    network = nn.Sequential(
        Block(),
        nn.MaxPool2d(3, 2),
        nn.AvgPool2d((2, 1)),
        nn.Flatten(2),
        nn.MaxPool1d(3, 2),
        nn.Conv1d(3, 6, 3, groups=3),
    )
    found = table(lambda: network, 3, 21, 21)[["kernel", "stride", "groups"]]
    assert found.loc["0"].tolist() == ["", "", ""]
    assert found.loc["0.mix"].tolist() == ["1x1", "1x1", "1"]
    assert found.loc["1"].tolist() == ["3x3", "2x2", ""]
    assert found.loc["2"].tolist() == ["2x1", "2x1", ""]
    assert found.loc["4"].tolist() == ["3", "2", ""]
    assert found.loc["5"].tolist() == ["3", "1", "3"]
