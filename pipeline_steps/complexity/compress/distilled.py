"""Distillation: a smaller model learns what the refitted one answers, beside the labels."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline_steps.complexity.compress.refitted import Made, Refitted
from pipeline_steps.complexity.compress.threads import threads_restored
from pipeline_steps.complexity.compress.training import Goal, Plan, fit_anew
from pipeline_steps.files import atomic_path
from pipeline_steps.params_compress import Distilled
from pipeline_steps.progress import say, track
from pipeline_steps.vision.objective import Objective


@dataclass(frozen=True)
class Distillation(Objective):
    """An objective with a teacher, as in Hinton, Vinyals & Dean 2015, "Distilling the knowledge in a neural network".

    The loss is (1 - soft_share) of the objective's own plus soft_share T² of the Kullback-Leibler divergence between
    both sides' answers at temperature T; T² keeps the gradients of the same size at every temperature. In a multilabel
    target each class is a question of its own, yes or no. Codes have a last column more: the sample's row in `teacher`.

    Attributes:
        teacher: logits of the teacher (n, n_outputs).
    """

    temperature: float = 1.0
    soft_share: float = 0.0
    teacher: Tensor = field(default_factory=lambda: torch.empty(0), repr=False, compare=False)
    _placed: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def split_codes(self, codes: Tensor) -> list[Tensor]:
        """As of the objective, without the last column."""
        return list(super().split_codes(codes[:, :-1]))

    def loss(self, logits: Tensor, codes: Tensor, weights: list[Tensor | None]) -> Tensor:  # type: ignore[override]
        """A scalar; logits (batch, n_outputs), codes (batch, k + 1)."""
        hard = super().loss(logits, codes, weights)
        if logits.device not in self._placed:  # moved once, not at every step
            self._placed[logits.device] = self.teacher.to(logits.device)
        taught = self._placed[logits.device][codes[:, -1]]
        parts = zip(self.outputs, self.split(logits), self.split(taught), strict=True)
        soft = [
            _divergence(part / self.temperature, answer / self.temperature, output.multilabel)
            for output, part, answer in parts
        ]
        return (1 - self.soft_share) * hard + self.soft_share * self.temperature**2 * torch.stack(soft).sum()


def make(refitted: Refitted, name: str, settings: Distilled, out: Path) -> Made:
    """Trains `settings.student` on the labels and on the refitted model's answers."""
    params = refitted.settings_of_all
    student, training = params.models[settings.student], params.training[settings.student]

    def taught(goal: Goal) -> Goal:
        objective, codes = goal
        own = (objective.outputs, objective.criterion, objective.class_weights)
        teacher = objective.logits(answers(refitted, name))
        rows = torch.arange(len(codes)).unsqueeze(1)
        changed = Distillation(*own, settings.temperature, settings.soft_share, teacher)
        return changed, torch.cat([codes, rows], dim=1)

    told = (
        f"{settings.student} in place of {refitted.model}, trained for {training.max_epochs} epochs, "
        f"{settings.soft_share:.0%} of its loss from the answers of that model at temperature {settings.temperature:g}"
    )
    return fit_anew(refitted, name, Plan(student, training, training.max_epochs), out, told, taught)


def answers(refitted: Refitted, name: str) -> Tensor:
    """The refitted model's probabilities, float32 (n, n_outputs), of all samples; those of the holdout stay 0.

    Of the packaged model, so the mean over both views where it averages them; a student learns it for either view.
    """
    from pipeline_steps.serving.classifier import Classifier

    path = refitted.scratch / f"answers-{refitted.key}.npy"
    if path.is_file():
        return torch.from_numpy(np.load(path))
    rows = refitted.samples[refitted.samples["side"] == "train"]
    n_outputs = sum(len(target.classes) for target in refitted.targets)
    found = np.zeros((len(refitted.samples), n_outputs), dtype=np.float32)
    say(f"compress: {name}: {refitted.model} answers {len(rows):,} images of training")
    with threads_restored():  # a classifier takes one
        answered = Classifier(refitted.package).probabilities(refitted.encoded(rows))
        images = track(answered, f"compress {name}", len(rows), "images")
        for row, answer in zip(rows.index, images, strict=True):
            if isinstance(answer, Exception):
                raise answer
            found[row] = np.concatenate([answer[target.name] for target in refitted.targets])
    with atomic_path(path) as partial, partial.open("wb") as file:
        np.save(file, found)
    return torch.from_numpy(found)


def _divergence(student: Tensor, teacher: Tensor, multilabel: bool) -> Tensor:
    """KL(teacher || student) a sample, in the mean over the batch; of logits (batch, n_classes)."""
    if multilabel:  # of two answers to each class
        student, teacher = (
            torch.stack([functional.logsigmoid(part), functional.logsigmoid(-part)], -1) for part in (student, teacher)
        )
        return functional.kl_div(student, teacher, log_target=True, reduction="sum") / len(student)
    return functional.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")
