"""The training loop: exact resume, early stopping, weights and views against hand-made cases and scikit-learn."""

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from pipeline_steps.vision.engine import Epoch, Fitted, Lesson, Schedule, best_epoch, fit, predict
from pipeline_steps.vision.inputs import Features, Pixels
from pipeline_steps.vision.losses import CrossEntropy, Focal
from pipeline_steps.vision.networks import CustomCnn, Head
from pipeline_steps.vision.objective import Objective, Output
from pipeline_steps.vision.optimizer import EagerAdamW, OneCycle, Optimization

OPTIMIZATION = Optimization("adamw", 0.01, weight_decay=0.01, layer_decay=1.0, decay=OneCycle(), max_epochs=8)
SCHEDULE = Schedule(
    n_epochs=None, patience=8, batch_size=16, optimization=OPTIMIZATION, weight_average=0.9, mirror=True, seed=3
)
OBJECTIVE = Objective((Output(multilabel=False, n_classes=3),), CrossEntropy(label_smoothing=0.1), "balanced")
# A class of three, and beside it which of two apply.
SEVERAL = Objective((Output(False, 3), Output(True, 2)), Focal(2.0), "none")
TRAIN, INNER = torch.arange(0, 60), torch.arange(60, 90)


def labels() -> torch.Tensor:
    return torch.arange(90) % 3


def several_codes() -> torch.Tensor:
    return torch.stack([labels(), labels() > 0, labels() % 2], dim=1).long()


def features() -> Features:
    noise = torch.Generator().manual_seed(0)
    values = torch.nn.functional.one_hot(labels(), 5).float()[:, None].repeat(1, 2, 1)
    return Features(values + 0.7 * torch.randn(90, 2, 5, generator=noise))


def pixels() -> Pixels:
    noise = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (90, 3, 16, 16), generator=noise)
    values[:, 0] = (values[:, 0] // 4 + labels().view(-1, 1, 1) * 60).clamp(0, 255)
    return Pixels(values.to(torch.uint8))


def plan(schedule: Schedule = SCHEDULE, **changes) -> Schedule:
    """The schedule with other settings of the optimization."""
    return replace(schedule, optimization=replace(schedule.optimization, **changes))


def head() -> Head:
    torch.manual_seed(1)
    return Head(5, 3, hidden=8, dropout=0.3)


def cnn() -> CustomCnn:
    torch.manual_seed(1)
    return CustomCnn([(4, 3, 2), (8, 3, 2)], 3, hidden=0, dropout=0.2)


def run(
    network,
    inputs,
    checkpoint: Path,
    on_epoch=lambda _: None,
    schedule=SCHEDULE,
    version="v1",
    on_resume=None,
    objective=OBJECTIVE,
    codes=None,
) -> Fitted:
    more = {"on_resume": on_resume} if on_resume else {}
    codes = labels()[:, None] if codes is None else codes
    return fit(network, Lesson(objective, inputs, codes, TRAIN, INNER, schedule, checkpoint, version), on_epoch, **more)


def alone(network, inputs, schedule, checkpoint: Path, on_epoch=lambda _: None) -> Fitted:
    """Without an inner part."""
    lesson = Lesson(OBJECTIVE, inputs, labels()[:, None], TRAIN, None, schedule, checkpoint, "v1")
    return fit(network, lesson, on_epoch)


@pytest.mark.parametrize(("build", "inputs"), [(head, features), (cnn, pixels)], ids=["head", "cnn"])
@pytest.mark.parametrize("stop_after", [1, 5])
def test_an_interrupted_training_ends_with_the_same_bits(build, inputs, stop_after: int, tmp_path: Path) -> None:
    undisturbed = run(build(), inputs(), tmp_path / "undisturbed.pt")

    def interrupt(epoch: Epoch) -> None:
        if epoch.epoch == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(build(), inputs(), tmp_path / "checkpoint.pt", interrupt)
    torch.rand(1000)  # whatever else draws random numbers in between must not matter
    found: list[Epoch] = []
    trained: list[Epoch] = []
    resumed = run(build(), inputs(), tmp_path / "checkpoint.pt", trained.append, on_resume=found.extend)

    assert len(found) == stop_after  # none of them is trained again
    assert resumed.history == undisturbed.history == found + trained
    assert resumed.best_epoch == undisturbed.best_epoch
    assert resumed.state.keys() == undisturbed.state.keys()
    for name, tensor in resumed.state.items():
        assert torch.equal(tensor, undisturbed.state[name]), name


@pytest.mark.parametrize("change", ["schedule", "version", "network", "objective"])
def test_a_checkpoint_of_other_arguments_is_not_taken_up(change: str, tmp_path: Path) -> None:
    run(head(), features(), tmp_path / "checkpoint.pt", schedule=plan(max_epochs=2))
    network, schedule, version, objective = head(), plan(max_epochs=2), "v1", OBJECTIVE
    if change == "schedule":
        schedule = plan(schedule, learning_rate=0.02)
    elif change == "version":
        version = "v2"
    elif change == "objective":
        objective = replace(OBJECTIVE, criterion=Focal(2.0))
    else:
        torch.manual_seed(99)
        network = Head(5, 3, hidden=8, dropout=0.3)
    more = {"schedule": schedule, "version": version, "objective": objective}
    fresh = run(network, features(), tmp_path / "none.pt", **more)
    first = {name: tensor.clone() for name, tensor in fresh.state.items()}
    torch.manual_seed(99 if change == "network" else 1)
    again = run(Head(5, 3, hidden=8, dropout=0.3), features(), tmp_path / "checkpoint.pt", **more)
    assert all(torch.equal(first[name], tensor) for name, tensor in again.state.items())


def test_a_finished_checkpoint_is_not_trained_further(tmp_path: Path) -> None:
    once = run(head(), features(), tmp_path / "checkpoint.pt")
    twice = run(head(), features(), tmp_path / "checkpoint.pt")
    assert twice.history == once.history


def test_the_weights_that_stay_are_the_moving_average_at_the_best_inner_epoch(tmp_path: Path) -> None:
    """One step an epoch, so that the average can be followed from outside: a <- 0.9 a + 0.1 w, from the first w on."""
    averages: list[torch.Tensor] = []
    network = head()

    def follow(_: Epoch) -> None:
        weight = network.layers[1].weight.detach().clone()
        averages.append(0.9 * averages[-1] + 0.1 * weight if averages else weight)

    fitted = run(network, features(), tmp_path / "c.pt", follow, replace(SCHEDULE, batch_size=60))
    scores = [(line.inner_f1_weighted, -line.inner_loss) for line in fitted.history]
    assert fitted.best_epoch == scores.index(max(scores)) + 1
    torch.testing.assert_close(fitted.state["layers.1.weight"], averages[fitted.best_epoch - 1])


def test_without_averaging_the_weights_are_those_of_the_best_epoch(tmp_path: Path) -> None:
    kept: list[torch.Tensor] = []
    network = cnn()
    schedule = replace(SCHEDULE, weight_average=0.0)
    follow = lambda _: kept.append(network.body[1].running_mean.clone())  # noqa: E731
    fitted = run(network, pixels(), tmp_path / "c.pt", follow, schedule)
    assert torch.equal(fitted.state["body.1.running_mean"], kept[fitted.best_epoch - 1])


@pytest.mark.parametrize(("build", "inputs"), [(head, features), (cnn, pixels)], ids=["head", "cnn"])
@pytest.mark.parametrize("n_epochs", [1, 5, 8])
def test_without_an_inner_part_it_takes_the_very_path_of_a_fold(build, inputs, n_epochs: int, tmp_path: Path) -> None:
    """The same weights after as many epochs, whether or not an inner part was scored after each of them."""
    averages: list[dict[str, torch.Tensor]] = []

    def follow(_: Epoch) -> None:
        state = torch.load(tmp_path / "fold.pt", weights_only=True)["average"]
        averages.append({name.removeprefix("module."): tensor for name, tensor in state.items()})

    fold = run(build(), inputs(), tmp_path / "fold.pt", follow)
    schedule = replace(SCHEDULE, n_epochs=n_epochs)
    fitted = alone(build(), inputs(), schedule, tmp_path / "alone.pt")
    assert fitted.best_epoch == len(fitted.history) == n_epochs
    assert [line.train_loss for line in fitted.history] == [line.train_loss for line in fold.history[:n_epochs]]
    assert [line.train_accuracy for line in fitted.history] == [line.train_accuracy for line in fold.history[:n_epochs]]
    for line in fitted.history:
        assert line.inner_loss is line.inner_accuracy is line.inner_f1_weighted is None
    for name, tensor in fitted.state.items():
        assert torch.equal(tensor, averages[n_epochs - 1][name]), name


def test_without_an_inner_part_the_learning_rate_still_follows_max_epochs(tmp_path: Path) -> None:
    """Smith & Topin's cycle by hand: up along a cosine over a fifth of all steps, then down; 4 steps an epoch."""
    rates: list[float] = []

    def follow(_: Epoch) -> None:
        rates.append(torch.load(tmp_path / "c.pt", weights_only=True)["optimizer"]["param_groups"][0]["lr"])

    schedule, peak = replace(SCHEDULE, n_epochs=5), OPTIMIZATION.learning_rate
    alone(head(), features(), schedule, tmp_path / "c.pt", follow)
    total, rise = 8 * 4 - 1, 0.2 * 8 * 4 - 1  # of the last step and of the highest
    for step, rate in zip(range(4, 24, 4), rates, strict=True):
        if step <= rise:
            start, end, share = peak / 25, peak, step / rise
        else:
            start, end, share = peak, peak / 25 / 1e4, (step - rise) / (total - rise)
        assert rate == pytest.approx(end + (start - end) * (1 + np.cos(np.pi * share)) / 2), step
    assert rates[-1] > 0.2 * peak, "a cycle of five epochs would have ended near 0"


def test_an_interrupted_training_without_an_inner_part_ends_with_the_same_bits(tmp_path: Path) -> None:
    def train(checkpoint: str, on_epoch=lambda _: None) -> Fitted:
        schedule = replace(SCHEDULE, n_epochs=6)
        return alone(cnn(), pixels(), schedule, tmp_path / checkpoint, on_epoch)

    def interrupt(epoch: Epoch) -> None:
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    undisturbed = train("undisturbed.pt")
    with pytest.raises(KeyboardInterrupt):
        train("interrupted.pt", interrupt)
    trained: list[Epoch] = []
    resumed = train("interrupted.pt", trained.append)
    assert [epoch.epoch for epoch in trained] == [3, 4, 5, 6]
    assert resumed.history == undisturbed.history
    assert all(torch.equal(tensor, undisturbed.state[name]) for name, tensor in resumed.state.items())


def test_patience_counts_epochs_without_a_better_score(tmp_path: Path) -> None:
    schedule = plan(replace(SCHEDULE, patience=3), max_epochs=40, learning_rate=0.05)
    fitted = run(head(), features(), tmp_path / "c.pt", schedule=schedule)
    assert len(fitted.history) == fitted.best_epoch + 3 < 40


@pytest.mark.parametrize(("losses", "best"), [([9, 3, 2, 1], 3), ([9, 2, 3, 1], 2), ([9, 2, 2, 1], 2)])
def test_of_equal_scores_the_lowest_loss_is_the_best_and_then_the_first(losses: list[float], best: int) -> None:
    scores = [0.2, 0.5, 0.5, 0.1]
    history = [Epoch(k, 0.0, 0.0, loss, 0.0, f1) for k, (loss, f1) in enumerate(zip(losses, scores, strict=True), 1)]
    assert best_epoch(history) == best
    assert best_epoch([]) == 0


def test_the_history_says_what_the_batches_and_the_inner_part_gave(tmp_path: Path) -> None:
    """One step an epoch without dropout or averaging, so that each line can be computed again from outside."""
    torch.manual_seed(1)
    network, inputs, codes = Head(5, 5, hidden=0, dropout=0.0), features(), several_codes()
    weights: list[dict[str, torch.Tensor]] = [{name: tensor.clone() for name, tensor in network.state_dict().items()}]
    schedule = plan(replace(SCHEDULE, batch_size=60, mirror=False, weight_average=0.0), max_epochs=3)
    follow = lambda _: weights.append({name: tensor.clone() for name, tensor in network.state_dict().items()})  # noqa: E731
    fitted = run(network, inputs, tmp_path / "c.pt", follow, schedule, objective=SEVERAL, codes=codes)

    def scores(state: dict[str, torch.Tensor], rows: torch.Tensor) -> tuple[float, float, float]:
        network.load_state_dict(state)
        with torch.no_grad():
            logits = network(inputs.values[rows, 0])
        first, second = (codes[rows][:, 0], codes[rows][:, 1:])
        p = torch.gather(logits[:, :3].softmax(1), 1, first[:, None])
        q = torch.where(second == 1, logits[:, 3:].sigmoid(), 1 - logits[:, 3:].sigmoid())
        loss = (-((1 - p) ** 2) * p.log()).mean() + (-((1 - q) ** 2) * q.log()).mean()
        pairs = [(first, logits[:, :3].argmax(1)), (second, logits[:, 3:] >= 0)]
        accuracy = np.mean([accuracy_score(truth, found) for truth, found in pairs])
        f1 = np.mean([f1_score(truth, found, average="weighted", zero_division=0.0) for truth, found in pairs])
        return float(loss), float(accuracy), float(f1)

    for before, after, line in zip(weights, weights[1:], fitted.history, strict=False):
        assert (line.train_loss, line.train_accuracy) == pytest.approx(scores(before, TRAIN)[:2])
        inner = (line.inner_loss, line.inner_accuracy, line.inner_f1_weighted)
        assert inner == pytest.approx(scores(after, INNER), rel=1e-4)
    assert len({line.train_accuracy for line in fitted.history}) > 1


def test_several_targets_are_learned_side_by_side(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network, inputs, codes = Head(5, 5, hidden=0, dropout=0.0), features(), several_codes()
    schedule = plan(replace(SCHEDULE, patience=30, weight_average=0.0), max_epochs=30, learning_rate=0.05)
    fitted = run(network, inputs, tmp_path / "c.pt", schedule=schedule, objective=SEVERAL, codes=codes)
    network.load_state_dict(fitted.state)
    first, second = SEVERAL.split(predict(network, SEVERAL, inputs, INNER, mirror=True))
    assert (first.argmax(1) == codes[INNER, 0]).float().mean() > 0.8
    assert ((second >= 0.5) == codes[INNER, 1:]).float().mean() > 0.8


def test_a_class_that_no_row_teaches_does_no_harm(tmp_path: Path) -> None:
    """Four classes, of which the last has rows in the inner part only; balanced weights and smoothing invite it."""
    objective = replace(OBJECTIVE, outputs=(Output(False, 4),))
    codes = labels()[:, None].clone()
    codes[INNER[-2:]] = 3
    torch.manual_seed(1)
    network = Head(5, 4, hidden=0, dropout=0.0)
    schedule = plan(replace(SCHEDULE, patience=30), max_epochs=30, learning_rate=0.05)
    fitted = run(network, features(), tmp_path / "c.pt", schedule=schedule, objective=objective, codes=codes)
    network.load_state_dict(fitted.state)
    probabilities = predict(network, objective, features(), INNER, mirror=True)
    assert (probabilities.argmax(1) == labels()[INNER]).float().mean() > 0.8
    assert torch.isfinite(probabilities).all()


def test_a_single_sample_at_the_end_of_an_epoch_is_left_out(tmp_path: Path) -> None:
    codes, rows = labels()[:, None], torch.arange(0, 33)
    lesson = Lesson(OBJECTIVE, pixels(), codes, rows, INNER, SCHEDULE, tmp_path / "c.pt", "v1")
    fitted = fit(cnn(), lesson, lambda _: None)
    for line in fitted.history:
        assert line.train_accuracy * 32 == pytest.approx(round(line.train_accuracy * 32))
    steps = torch.load(tmp_path / "c.pt", weights_only=True)["average"]["n_averaged"]
    assert int(steps) == 2 * len(fitted.history)


def test_batches_of_one_sample_are_trained_on(tmp_path: Path) -> None:
    schedule = plan(replace(SCHEDULE, batch_size=1), max_epochs=2)
    fitted = run(head(), features(), tmp_path / "c.pt", schedule=schedule)
    assert fitted.history[0].train_loss > 0
    assert not torch.equal(fitted.state["layers.1.weight"], head().state_dict()["layers.1.weight"])


def test_predict_averages_the_plain_and_the_mirrored_view() -> None:
    network, images, rows = cnn().eval(), pixels(), torch.tensor([5, 0, 17])
    with torch.no_grad():
        plain = network(images.values[rows]).softmax(1)
        mirrored = network(images.values[rows].flip(3)).softmax(1)
    torch.testing.assert_close(predict(network, OBJECTIVE, images, rows, mirror=True), (plain + mirrored) / 2)
    torch.testing.assert_close(predict(network, OBJECTIVE, images, rows, mirror=False), plain)


def test_views_are_picked_row_by_row() -> None:
    images, rows, mirrored = pixels(), torch.tensor([3, 4]), torch.tensor([True, False])
    batch = images.batch(rows, mirrored)
    assert torch.equal(batch[0], images.values[3].flip(2))
    assert torch.equal(batch[1], images.values[4])
    vectors = features()
    assert torch.equal(vectors.batch(rows, mirrored), torch.stack([vectors.values[3, 1], vectors.values[4, 0]]))


def test_the_head_standardises_by_what_it_was_given() -> None:
    network, values = head(), features().values[TRAIN]
    network.standardise_by(values)
    flat = values.reshape(-1, 5).numpy()
    np.testing.assert_allclose(network.mean, flat.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(network.std, flat.std(0, ddof=1), rtol=1e-4)


def test_the_optimizer_takes_the_very_steps_of_torch() -> None:
    trained = []
    for optimizer_class in (torch.optim.AdamW, EagerAdamW):
        network, values = head().eval(), features().values
        optimizer = optimizer_class(network.parameters(), 0.01, weight_decay=0.1, fused=True)
        for _ in range(20):
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(network(values[:, 0]), labels()).backward()
            optimizer.step()
        trained.append([parameter.detach() for parameter in network.parameters()])
    assert all(torch.equal(theirs, ours) for theirs, ours in zip(*trained, strict=True))


def test_training_does_not_import_the_compiler() -> None:
    code = (
        "import sys; from pathlib import Path; import test_engine as t;"
        "t.run(t.head(), t.features(), Path(sys.argv[1]) / 'c.pt'); assert 'torch._dynamo' not in sys.modules"
    )
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", code, folder], cwd=Path(__file__).parent, check=True)
