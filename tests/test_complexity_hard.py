"""Networks that are hard to count: those that need values, write in place, call by keyword, or cannot be counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import draw, encode, load_params
from torch import Tensor, nn

from pipeline_steps import profile
from pipeline_steps.complexity import operations, report
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
