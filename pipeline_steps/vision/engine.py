"""The training loop: seeded, early-stopped on an inner part, resumable after every epoch."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline_steps.files import atomic_path
from pipeline_steps.vision.augment import Augmentation
from pipeline_steps.vision.inputs import Inputs
from pipeline_steps.vision.memory import keep_freed_memory
from pipeline_steps.vision.objective import Objective
from pipeline_steps.vision.optimizer import Optimization, build

if TYPE_CHECKING:
    from lightning_fabric import Fabric

SCORE_BATCH = 128
NO_AUGMENTATION = Augmentation()


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
    """How a network is trained; the loss is the objective's.

    Attributes:
        n_epochs: the number of epochs where no inner part chooses it; `optimization.max_epochs` still sets the rates.
        weight_average: decay a step of the moving average of the weights, which is what is scored and kept; 0: none.
        mirror: train on mirrored views too, and average both when scoring.
        head_epochs: first epochs, in which only `network.head` learns; `network.body` stays as it is, buffers too.
        bfloat16: compute in bfloat16 where torch's autocast does; weights, losses and `predict` stay float32.
        compile: by torch.compile.
    """

    n_epochs: int | None
    patience: int
    batch_size: int
    optimization: Optimization
    weight_average: float
    mirror: bool
    seed: int
    augmentation: Augmentation = NO_AUGMENTATION
    head_epochs: int = 0
    bfloat16: bool = False
    compile: bool = False


@dataclass(frozen=True)
class Lesson:
    """What a network learns, from what, and how.

    Attributes:
        objective: the targets and their loss; class weights are those of `train_rows`.
        codes: int64 (n, k), what each row of `inputs` is, in the objective's columns; on the device of `inputs`.
        train_rows: int64 on the CPU, rows to learn from.
        inner_rows: int64 on the CPU, rows that choose the epoch; disjoint from `train_rows` and from the scored fold;
            or None.
        checkpoint: where the whole state is saved after every epoch.
        inputs_version: names the contents of `inputs`, so that a checkpoint of other inputs is not taken up.
    """

    objective: Objective
    inputs: Inputs
    codes: Tensor
    train_rows: Tensor
    inner_rows: Tensor | None
    schedule: Schedule
    checkpoint: Path
    inputs_version: str

    def to(self, device: torch.device) -> "Lesson":
        """The same with inputs and codes on another device."""
        return replace(self, inputs=self.inputs.to(device), codes=self.codes.to(device))


@dataclass(frozen=True)
class Fitted:
    """The best epoch's weights and every epoch's line."""

    state: dict[str, Tensor]
    history: list[Epoch]
    best_epoch: int


def fit(
    network: nn.Module,
    lesson: Lesson,
    on_epoch: Callable[[Epoch], None],
    on_resume: Callable[[list[Epoch]], None] = lambda _: None,
    fabric: "Fabric | None" = None,
) -> Fitted:
    """Trains `network` and returns the weights of the epoch with the best weighted F1 on the inner rows.

    Without inner rows, it trains for the schedule's `n_epochs` and returns the last epoch's weights.

    After every epoch the whole state is saved in the lesson's checkpoint; a later call with the same network and lesson
    goes on from it and ends with the same weights as an undisturbed run, wherever that was broken off (on a CPU, bit
    for bit). A checkpoint of others is ignored.

    Args:
        network: takes what `inputs.batches` gives, returns logits (batch, objective.n_outputs); on their device.
        on_epoch: called with each epoch that this call finishes.
        on_resume: called first with the epochs that the checkpoint holds, where there is one that fits.
        fabric: where several processes train together (`distributed.fit`): each takes its share of every batch.
    """
    schedule = lesson.schedule
    torch.manual_seed(schedule.seed)
    loop = _Loop(network, lesson, fabric)
    key = _fingerprint(network, lesson, loop.size)
    saved = _load(lesson.checkpoint, key)
    if saved is not None:
        loop.take_up(saved)
        on_resume(loop.history)
    last = schedule.optimization.max_epochs if schedule.n_epochs is None else schedule.n_epochs
    while len(loop.history) < last and len(loop.history) - best_epoch(loop.history) < schedule.patience:
        line = loop.epoch()
        if loop.rank == 0:
            with atomic_path(lesson.checkpoint) as unfinished:
                torch.save({"key": key} | loop.state(), unfinished)
            on_epoch(line)
    return Fitted(loop.best, loop.history, best_epoch(loop.history))


def predict(
    network: nn.Module, objective: Objective, inputs: Inputs, rows: Tensor, mirror: bool, bfloat16: bool = False
) -> Tensor:
    """Probabilities, float32 (len(rows), n_outputs); with `mirror` the mean over the plain and mirrored view.

    Args:
        rows: int64 on the CPU.
    """
    network.eval()
    answered = []
    with torch.inference_mode(), _precision(inputs, bfloat16):
        for view in (False, True) if mirror else (False,):
            batches = inputs.batches(rows, torch.full((len(rows),), view), SCORE_BATCH)
            answered.append(torch.cat([objective.probabilities(network(batch).float()) for batch in batches]))
    return torch.stack(answered).mean(0)


def best_epoch(history: list[Epoch]) -> int:
    """Number of the epoch with the highest inner weighted F1, or of the last one without an inner part.

    Of equals, which a small inner part often gives, the one with the lowest inner loss; of those the first.
    """
    scored = [
        (-line.inner_f1_weighted, line.inner_loss)
        for line in history
        if line.inner_f1_weighted is not None and line.inner_loss is not None
    ]
    return scored.index(min(scored)) + 1 if scored else len(history)


class _Loop:
    """A training and all that changes in it."""

    def __init__(self, network: nn.Module, lesson: Lesson, fabric: "Fabric | None") -> None:
        self.network, self.lesson, self.fabric = network, lesson, fabric
        objective, codes, rows, schedule = lesson.objective, lesson.codes, lesson.train_rows, lesson.schedule
        self.rank, self.size = (fabric.global_rank, fabric.world_size) if fabric else (0, 1)
        if codes.device.type == "cpu":
            keep_freed_memory()
        else:
            torch.backends.cudnn.benchmark = True  # batches keep their size: the quickest kernels are worth a search
        self.head_alone: bool | None = None
        self.forward: Callable[[Tensor], Tensor] = network
        self.loss = partial(objective.loss, weights=objective.weights(codes[rows.to(codes.device)]))
        self.order = torch.Generator().manual_seed(schedule.seed)
        self.random = torch.Generator().manual_seed(schedule.seed)  # of the augmentation
        steps = -(-len(self._share(rows)) // (schedule.batch_size // self.size))
        self.optimizer, self.rates = build(network, schedule.optimization, steps)
        self.body: list[nn.Parameter] = []
        if schedule.head_epochs:  # some networks keep parameters of their own fixed
            self.body = [part for part in network.get_submodule("body").parameters() if part.requires_grad]
        decay = get_ema_multi_avg_fn(schedule.weight_average)
        self.average = AveragedModel(network, multi_avg_fn=decay, use_buffers=True)
        self.best = _copy(network)
        self.history: list[Epoch] = []

    def epoch(self) -> Epoch:
        """Trains one more epoch, scores the averaged weights and keeps them where they are the best so far."""
        trained = self._train()
        inner = self._inner_scores() if self.rank == 0 else (None, None, None)
        line = Epoch(len(self.history) + 1, *trained, *inner)
        if self.fabric:
            line = self.fabric.broadcast(line)  # so that all stop after the same epoch
        self.history.append(line)
        if best_epoch(self.history) == line.epoch:
            self.best = _copy(self.average.module)
        return line

    def state(self) -> dict[str, Any]:
        """Everything that a later process needs to go on; tensors and plain values."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rates": self.rates.state_dict(),
            "average": self.average.state_dict(),
            "order": self.order.get_state(),
            "random": self.random.get_state(),
            "rng": torch.get_rng_state(),
            "best": self.best,
            "history": json.dumps([vars(line) for line in self.history]),
        }

    def take_up(self, saved: dict[str, Any]) -> None:
        """Goes back to what `state` gave."""
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.rates.load_state_dict(saved["rates"])
        self.average.load_state_dict(saved["average"])
        self.order.set_state(saved["order"])
        self.random.set_state(saved["random"])
        torch.set_rng_state(saved["rng"])
        self.best = saved["best"]
        self.history = [Epoch(**line) for line in json.loads(saved["history"])]

    def _train(self) -> tuple[float, float]:
        """One epoch; loss and accuracy over its batches."""
        objective, inputs, codes, rows = (
            self.lesson.objective, self.lesson.inputs, self.lesson.codes, self.lesson.train_rows,
        )  # fmt: skip
        schedule, device = self.lesson.schedule, codes.device
        self._enter_stage()
        shuffled = rows[torch.randperm(len(rows), generator=self.order)]
        mirrored = torch.rand(len(rows), generator=self.order) < (0.5 if schedule.mirror else 0.0)
        shuffled, mirrored = (self._share(part) for part in (shuffled, mirrored))
        batch_size = schedule.batch_size // self.size
        truths = codes[shuffled.to(device)]
        total = torch.zeros((), device=device)
        # Scored once an epoch and kept in one piece: a head's steps are so quick that either else would show.
        answers = torch.empty(len(shuffled), objective.n_outputs, device=device)
        batches = inputs.batches(shuffled, mirrored, batch_size)
        parts = (part.split(batch_size) for part in (truths, answers))
        for batch, truth, answer in zip(batches, *parts, strict=True):
            self.optimizer.zero_grad(set_to_none=True)
            seen, mixture = schedule.augmentation.mixed(schedule.augmentation.views(batch, self.random), self.random)
            with _precision(inputs, schedule.bfloat16):
                logits = self.forward(seen)
            logits = logits.float()
            value = self.loss(logits, truth)
            if mixture is not None:
                value = mixture.share * value + (1 - mixture.share) * self.loss(logits, truth[mixture.partners])
            if self.fabric:
                self.fabric.backward(value)
            else:
                value.backward()
            self.optimizer.step()
            self.rates.step()
            self.average.update_parameters(self.network)
            total += value.detach() * len(truth)
            answer.copy_(logits.detach())
        accuracy = objective.accuracy(objective.probabilities(answers), truths)
        return self._mean(float(total) / len(shuffled)), self._mean(accuracy)

    def _mean(self, score: float) -> float:
        """Over the processes, of which each has the same number of samples."""
        if not self.fabric:
            return score
        return float(self.fabric.all_reduce(torch.tensor(score, dtype=torch.float64, device=self.lesson.codes.device)))  # type: ignore[arg-type]

    def _enter_stage(self) -> None:
        """What learns in the coming epoch: all, or the head alone."""
        schedule = self.lesson.schedule
        head_alone = len(self.history) < schedule.head_epochs
        self.network.train()
        if schedule.head_epochs:
            for parameter in self.body:
                parameter.requires_grad_(not head_alone)
            self.network.get_submodule("body").train(not head_alone)  # in training mode batch norm's buffers move
        if head_alone != self.head_alone:  # what gathers the gradients of several processes knows which will come
            self.head_alone = head_alone
            if self.fabric:
                spread = self.fabric.setup_module(self.network, move_to_device=False)
                self.forward = torch.compile(spread) if schedule.compile else spread
            else:
                self.forward = torch.compile(self.network) if schedule.compile else self.network
        if self.size > 1:  # only the first process's random state is in the checkpoint
            seed = (schedule.seed * 1000 + len(self.history)) * self.size + self.rank
            torch.manual_seed(seed)
            self.random.manual_seed(seed)

    def _share(self, rows: Tensor) -> Tensor:
        """What this process takes of an epoch's rows: of each batch as much as every other.

        A last batch that would leave a process a single sample, which batch norm cannot train on, is left out.
        """
        size = self.lesson.schedule.batch_size
        rest = len(rows) % size // self.size
        if rest == 1 and len(rows) > self.size:
            rest = 0
        return rows[: len(rows) // size * size + rest * self.size][self.rank :: self.size]

    def _inner_scores(self) -> tuple[float, float, float] | tuple[None, None, None]:
        """Loss, accuracy and weighted F1 of the averaged weights on the inner rows."""
        objective, rows, schedule = self.lesson.objective, self.lesson.inner_rows, self.lesson.schedule
        if rows is None:
            return None, None, None
        found = predict(self.average.module, objective, self.lesson.inputs, rows, schedule.mirror, schedule.bfloat16)
        truth = self.lesson.codes[rows.to(self.lesson.codes.device)]
        mean_loss = float(self.loss(objective.logits(found), truth))
        return mean_loss, objective.accuracy(found, truth), objective.score(found, truth)


def _precision(inputs: Inputs, bfloat16: bool) -> torch.autocast:
    return torch.autocast(inputs.device.type, torch.bfloat16, enabled=bfloat16)


def _fingerprint(network: nn.Module, lesson: Lesson, n_processes: int) -> str:
    version = f"{lesson.inputs_version} by {n_processes}"
    digest = hashlib.sha256(repr((lesson.schedule, lesson.objective, str(network), version)).encode())
    inner = [] if lesson.inner_rows is None else [lesson.inner_rows]
    for tensor in (*network.state_dict().values(), lesson.codes, lesson.train_rows, *inner):
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
    return digest.hexdigest()


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def _load(checkpoint: Path, key: str) -> dict[str, Any] | None:
    if not checkpoint.is_file():
        return None
    saved: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return saved if saved["key"] == key else None
