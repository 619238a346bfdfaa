"""One training in two processes on the CPU, against the same in one."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_engine import INNER, SCHEDULE, TRAIN, labels, pixels, plan

from pipeline_steps.vision import distributed, engine
from pipeline_steps.vision.engine import Epoch, Fitted, Lesson
from pipeline_steps.vision.losses import CrossEntropy
from pipeline_steps.vision.networks import CustomCnn
from pipeline_steps.vision.objective import Objective, Output

OBJECTIVE = Objective((Output(multilabel=False, n_classes=3),), CrossEntropy(), "none")
# 60 rows, 16 a batch: the last batch of an epoch has 12. The head learns alone first, so the gradients change too.
SPREAD = plan(replace(SCHEDULE, head_epochs=1), max_epochs=6)


def network() -> CustomCnn:
    torch.manual_seed(1)
    return CustomCnn([(4, 3, 2, "same"), (8, 3, 2, "same")], 3, hidden=0, dropout=0.0, batch_norm=False)


def arguments(checkpoint: Path) -> tuple:
    return network(), Lesson(OBJECTIVE, pixels(), labels()[:, None], TRAIN, INNER, SPREAD, checkpoint, "v1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def two(folder: Path) -> Fitted:
    told: list[Epoch] = []

    def follow(epoch: Epoch) -> None:
        told.append(epoch)
        if epoch.epoch == 1:
            shutil.copy(folder / "two.pt", folder / "early.pt")

    fitted = distributed.fit([torch.device("cpu")] * 2, *arguments(folder / "two.pt"), follow)
    assert told == fitted.history
    return fitted


def test_two_processes_take_the_steps_of_one(folder: Path, two: Fitted) -> None:
    one = engine.fit(*arguments(folder / "one.pt"), lambda _: None)
    for ours, theirs in zip(two.history, one.history, strict=True):
        assert list(vars(ours).values()) == pytest.approx(list(vars(theirs).values()), rel=1e-4)
    assert two.state.keys() == one.state.keys()
    for name, tensor in two.state.items():
        torch.testing.assert_close(tensor, one.state[name], rtol=1e-3, atol=1e-5)


def test_an_interrupted_one_ends_with_the_same_bits(folder: Path, two: Fitted) -> None:
    found: list[Epoch] = []
    devices = [torch.device("cpu")] * 2
    resumed = distributed.fit(devices, *arguments(folder / "early.pt"), lambda _: None, found.extend)
    assert found
    assert found == two.history[: len(found)]
    assert resumed.history == two.history
    for name, tensor in resumed.state.items():
        assert torch.equal(tensor, two.state[name]), name
