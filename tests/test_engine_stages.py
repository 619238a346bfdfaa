"""The training loop's stages, mixtures, precision and compilation; and what a kill at any step leaves."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_engine import OBJECTIVE, SCHEDULE, TRAIN, cnn, features, labels, pixels, plan, run

from pipeline_steps.vision.augment import Augmentation
from pipeline_steps.vision.engine import Fitted
from pipeline_steps.vision.networks import Head
from pipeline_steps.vision.optimizer import CosineDecay

STAGED = replace(
    plan(replace(SCHEDULE, head_epochs=2), max_epochs=5, optimizer="adam", decay=CosineDecay(1)),
    augmentation=Augmentation(min_crop=0.5, operations=1, magnitude=5, mixup=0.4, cutmix=1.0),
)


def body_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items() if name.startswith("body.")}


def test_only_the_head_learns_in_the_first_epochs_and_then_all(tmp_path: Path) -> None:
    network = cnn()
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    after: list[dict[str, torch.Tensor]] = []
    follow = lambda _: after.append({name: tensor.clone() for name, tensor in network.state_dict().items()})  # noqa: E731
    run(network, pixels(), tmp_path / "c.pt", follow, STAGED)
    for state in after[:2]:
        for name, tensor in body_of(state).items():
            assert torch.equal(tensor, start[name]), f"{name} moved"  # running means and variances too
    heads = [state["head.layers.1.weight"] for state in (start, *after)]
    assert not any(torch.equal(before, later) for before, later in pairwise(heads))
    assert not any(torch.equal(tensor, start[name]) for name, tensor in body_of(after[2]).items())


def killed_in_step(step: int, checkpoint: Path) -> None:
    """What the subprocess below runs: STAGED, ended by SIGKILL in the middle of the given step."""
    network, steps = cnn(), iter(range(1, 10**6))
    network.head.register_forward_hook(
        lambda module, *_: os.kill(os.getpid(), signal.SIGKILL) if module.training and next(steps) == step else None
    )
    run(network, pixels(), checkpoint, schedule=STAGED)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return run(cnn(), pixels(), tmp_path_factory.mktemp("undisturbed") / "c.pt", schedule=STAGED)


@pytest.mark.parametrize("step", [3, 7, 14])  # of 4 an epoch: without a checkpoint, head alone, all
def test_a_training_killed_in_any_step_ends_with_the_same_bits(step: int, undisturbed: Fitted, tmp_path: Path) -> None:
    code = f"import test_engine_stages as t; t.killed_in_step({step}, t.Path({str(tmp_path / 'c.pt')!r}))"
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (tmp_path / "c.pt").is_file() == (step > 4)
    trained: list[int] = []
    resumed = run(cnn(), pixels(), tmp_path / "c.pt", lambda line: trained.append(line.epoch), STAGED)
    assert trained == list(range((step - 1) // 4 + 1, 6))
    assert resumed.history == undisturbed.history
    assert resumed.state.keys() == undisturbed.state.keys()
    for name, tensor in resumed.state.items():
        assert torch.equal(tensor, undisturbed.state[name]), name


def test_a_mixture_is_trained_on_as_the_blend_of_both_losses(tmp_path: Path) -> None:
    """One step over all rows; the gradient of the first layer by hand, from the recorded mixture."""
    network = cnn()
    schedule = plan(
        replace(SCHEDULE, batch_size=60, mirror=False, weight_average=0.0, augmentation=Augmentation(mixup=1.0)),
        max_epochs=1,
        optimizer="sgd",
        weight_decay=0.0,
    )
    order, draws = (torch.Generator().manual_seed(SCHEDULE.seed) for _ in range(2))
    rows = TRAIN[torch.randperm(60, generator=order)]
    seen, mixture = schedule.augmentation.mixed(pixels().values[rows], draws)
    assert mixture is not None
    twin = cnn().train()
    torch.manual_seed(SCHEDULE.seed)  # dropout
    with torch.no_grad():
        logits = twin(seen)
    codes, weights = labels()[:, None], OBJECTIVE.weights(labels()[TRAIN, None])
    first, second = (OBJECTIVE.loss(logits, codes[part], weights) for part in (rows, rows[mixture.partners]))
    line = run(network, pixels(), tmp_path / "c.pt", schedule=schedule).history[0]
    assert line.train_loss == pytest.approx(float(mixture.share * first + (1 - mixture.share) * second), rel=1e-5)


def test_bfloat16_and_float32_learn_the_same(tmp_path: Path) -> None:
    schedule = plan(replace(SCHEDULE, patience=20), max_epochs=20)
    full = run(cnn(), pixels(), tmp_path / "full.pt", schedule=schedule)
    half = run(cnn(), pixels(), tmp_path / "half.pt", schedule=replace(schedule, bfloat16=True))
    assert all(tensor.dtype != torch.bfloat16 for tensor in half.state.values())
    assert half.history[0].train_loss == pytest.approx(full.history[0].train_loss, rel=0.02)
    assert half.history[0].train_loss != full.history[0].train_loss
    assert half.history[-1].inner_f1_weighted > 0.8


def test_a_compiled_training_takes_the_same_steps(tmp_path: Path) -> None:
    def train(compiled: bool) -> Fitted:
        torch.manual_seed(1)
        network = Head(5, 3, hidden=8, dropout=0.0)
        schedule = replace(plan(max_epochs=2), compile=compiled)
        return run(network, features(), tmp_path / f"{compiled}.pt", schedule=schedule)

    eager, compiled = train(False), train(True)
    assert compiled.state.keys() == eager.state.keys()
    for name, tensor in compiled.state.items():
        torch.testing.assert_close(tensor, eager.state[name])
