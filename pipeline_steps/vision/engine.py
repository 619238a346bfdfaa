"""The training loop: seeded, early-stopped on an inner part, resumable after every epoch."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline_steps.files import atomic_path
from pipeline_steps.vision.inputs import Inputs
from pipeline_steps.vision.objective import Objective
from pipeline_steps.vision.optimizer import EagerAdamW

SCORE_BATCH = 512
Loss = Callable[[Tensor, Tensor], Tensor]  # of logits (batch, n_outputs) and codes (batch, k)


@dataclass(frozen=True)
class Epoch:
    """One line of the history; None where there is no inner part.

    Both losses are the one that is trained, class weights and smoothing included. Those of training are means over the
    batches as they were seen, with dropout and with weights that still changed; those of the inner part are of the
    averaged weights and the mean probability over the views.

    Attributes:
        train_accuracy: share of right samples, in the mean over the targets; in a multilabel target all classes of a
            sample must be right.
        inner_accuracy: the same.
        inner_f1_weighted: the mean over the targets; chooses the epoch.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    inner_loss: float | None
    inner_accuracy: float | None
    inner_f1_weighted: float | None


@dataclass(frozen=True)
class Schedule:
    """The training loop's settings, as in the `training` block of params.yaml; the loss is the objective's.

    `n_epochs` is the number of epochs where no inner part chooses it; `max_epochs` still sets the learning rate.
    """

    n_epochs: int | None
    max_epochs: int
    patience: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    weight_average: float
    mirror: bool
    seed: int


@dataclass(frozen=True)
class Fitted:
    """The best epoch's weights and every epoch's line."""

    state: dict[str, Tensor]
    history: list[Epoch]
    best_epoch: int


def fit(
    network: nn.Module,
    objective: Objective,
    inputs: Inputs,
    codes: Tensor,
    train_rows: Tensor,
    inner_rows: Tensor | None,
    schedule: Schedule,
    checkpoint: Path,
    inputs_version: str,
    on_epoch: Callable[[Epoch], None],
    on_resume: Callable[[list[Epoch]], None] = lambda _: None,
) -> Fitted:
    """Trains `network` and returns the weights of the epoch with the best weighted F1 on the inner rows.

    Without inner rows, it trains for `schedule.n_epochs` and returns the last epoch's weights.

    After every epoch the whole state is saved in `checkpoint`; a later call with the same arguments goes on from it
    and ends with the same weights as an undisturbed run (on a CPU, bit for bit). A checkpoint of other arguments is
    ignored.

    Args:
        network: takes what `inputs.batch` gives, returns logits (batch, objective.n_outputs).
        objective: the targets and their loss; class weights are those of `train_rows`.
        codes: int64 (n, k), what each row of `inputs` is, in the objective's columns.
        train_rows: int64, rows to learn from.
        inner_rows: int64, rows that choose the epoch; disjoint from `train_rows` and from the scored fold; or None.
        inputs_version: names the contents of `inputs`, so that a checkpoint of other inputs is not taken up.
        on_epoch: called with each epoch that this call finishes.
        on_resume: called first with the epochs that the checkpoint holds, where there is one that fits.
    """
    torch.manual_seed(schedule.seed)
    order = torch.Generator().manual_seed(schedule.seed)
    optimizer = EagerAdamW(network.parameters(), schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True)
    # One cycle (Smith & Topin 2018): up over the first fifth, then down along a cosine. Small networks trained from
    # scratch on few images gain a lot from the warm-up (docs/decisions.md).
    steps = schedule.max_epochs * -(-len(train_rows) // schedule.batch_size)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.learning_rate, total_steps=steps, pct_start=0.2)
    # What is scored and kept: the exponential moving average of the weights over the steps, here with decay 0 too.
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(schedule.weight_average), use_buffers=True)
    loss = partial(objective.loss, weights=objective.weights(codes[train_rows]))

    history: list[Epoch] = []
    best = _copy(network)
    key = _fingerprint(network, objective, codes, train_rows, inner_rows, schedule, inputs_version)
    saved = _load(checkpoint, key)
    if saved is not None:
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        cycle.load_state_dict(saved["cycle"])
        average.load_state_dict(saved["average"])
        order.set_state(saved["order"])
        torch.set_rng_state(saved["rng"])
        best = saved["best"]
        history = [Epoch(**line) for line in json.loads(saved["history"])]
        on_resume(history)

    last = schedule.max_epochs if schedule.n_epochs is None else schedule.n_epochs
    while len(history) < last and len(history) - best_epoch(history) < schedule.patience:
        trained = _train_epoch(
            network, objective, loss, inputs, codes, train_rows, schedule, order, optimizer, cycle, average
        )
        inner = _inner_scores(average.module, objective, loss, inputs, codes, inner_rows, schedule.mirror)
        line = Epoch(len(history) + 1, *trained, *inner)
        history.append(line)
        if best_epoch(history) == line.epoch:
            best = _copy(average.module)
        state = {
            "key": key,
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "cycle": cycle.state_dict(),
            "average": average.state_dict(),
            "order": order.get_state(),
            "rng": torch.get_rng_state(),
            "best": best,
            "history": json.dumps([vars(item) for item in history]),
        }
        with atomic_path(checkpoint) as unfinished:
            torch.save(state, unfinished)
        on_epoch(line)
    return Fitted(best, history, best_epoch(history))


def predict(network: nn.Module, objective: Objective, inputs: Inputs, rows: Tensor, mirror: bool) -> Tensor:
    """Probabilities, float32 (len(rows), n_outputs); with `mirror` the mean over the plain and mirrored view."""
    network.eval()
    parts = []
    with torch.inference_mode():
        for part in rows.split(SCORE_BATCH):
            plain = torch.zeros(len(part), dtype=torch.bool, device=part.device)
            views = [plain, ~plain] if mirror else [plain]
            answered = [objective.probabilities(network(inputs.batch(part, view)).float()) for view in views]
            parts.append(torch.stack(answered).mean(0))
    return torch.cat(parts)


def best_epoch(history: list[Epoch]) -> int:
    """Number of the first epoch with the highest inner weighted F1, or of the last one without an inner part."""
    scores = [line.inner_f1_weighted for line in history if line.inner_f1_weighted is not None]
    return scores.index(max(scores)) + 1 if scores else len(history)


def _train_epoch(
    network: nn.Module,
    objective: Objective,
    loss: Loss,
    inputs: Inputs,
    codes: Tensor,
    rows: Tensor,
    schedule: Schedule,
    order: torch.Generator,
    optimizer: torch.optim.Optimizer,
    cycle: torch.optim.lr_scheduler.LRScheduler,
    average: AveragedModel,
) -> tuple[float, float]:
    """Loss and accuracy over the batches."""
    network.train()
    shuffled = rows[torch.randperm(len(rows), generator=order).to(rows.device)]
    mirrored = torch.rand(len(rows), generator=order).to(rows.device) < (0.5 if schedule.mirror else 0.0)
    if len(rows) > 1 and len(rows) % schedule.batch_size == 1:  # batch norm cannot train on a single sample
        shuffled, mirrored = shuffled[:-1], mirrored[:-1]
    total = torch.zeros((), device=rows.device)
    # Scored once an epoch and kept in one piece: a head's steps are so quick that either else would show.
    answers = torch.empty(len(shuffled), objective.n_outputs, device=rows.device)
    batches = (part.split(schedule.batch_size) for part in (shuffled, mirrored, answers))
    for part, view, answer in zip(*batches, strict=True):
        optimizer.zero_grad(set_to_none=True)
        logits = network(inputs.batch(part, view))
        value = loss(logits, codes[part])
        value.backward()
        optimizer.step()
        cycle.step()
        average.update_parameters(network)
        total += value.detach() * len(part)
        answer.copy_(logits.detach())
    accuracy = objective.accuracy(objective.probabilities(answers), codes[shuffled])
    return float(total) / len(shuffled), accuracy


def _inner_scores(
    network: nn.Module,
    objective: Objective,
    loss: Loss,
    inputs: Inputs,
    codes: Tensor,
    rows: Tensor | None,
    mirror: bool,
) -> tuple[float, float, float] | tuple[None, None, None]:
    """Loss, accuracy and weighted F1 on the inner rows."""
    if rows is None:
        return None, None, None
    probabilities, truth = predict(network, objective, inputs, rows, mirror), codes[rows]
    mean_loss = float(loss(objective.logits(probabilities), truth))
    return mean_loss, objective.accuracy(probabilities, truth), objective.score(probabilities, truth)


def _fingerprint(
    network: nn.Module,
    objective: Objective,
    codes: Tensor,
    train_rows: Tensor,
    inner_rows: Tensor | None,
    schedule: Schedule,
    inputs_version: str,
) -> str:
    digest = hashlib.sha256(repr((schedule, objective, str(network), inputs_version)).encode())
    for tensor in (*network.state_dict().values(), codes, train_rows, *([] if inner_rows is None else [inner_rows])):
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
    return digest.hexdigest()


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def _load(checkpoint: Path, key: str) -> dict[str, Any] | None:
    if not checkpoint.is_file():
        return None
    saved: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return saved if saved["key"] == key else None
