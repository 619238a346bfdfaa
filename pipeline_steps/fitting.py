"""From the blocks of params.yaml to what the engine trains: network, objective, schedule, on one device or several."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pipeline_steps.params_models import CustomCnn, FinetunedModel, FrozenModel, Model, ScratchModel, Training
from pipeline_steps.targets import Target
from pipeline_steps.vision.augment import Augmentation
from pipeline_steps.vision.engine import Epoch, Fitted, Lesson, Schedule, fit
from pipeline_steps.vision.inputs import Inputs
from pipeline_steps.vision.losses import Asymmetric, CrossEntropy, Focal, Loss
from pipeline_steps.vision.networks import CustomCnn as CustomCnnNetwork
from pipeline_steps.vision.networks import Head
from pipeline_steps.vision.objective import Objective, Output
from pipeline_steps.vision.optimizer import CosineDecay, Decay, OneCycle, Optimization, StepDecay


def build_objective(training: Training, targets: Sequence[Target]) -> Objective:
    """What the network is trained for: all targets, by the loss of params.yaml."""
    outputs = tuple(Output(target.multilabel, len(target.classes)) for target in targets)
    return Objective(outputs, _criterion(training), training.class_weights)


def _criterion(training: Training) -> Loss:
    loss = training.loss
    if loss.kind == "focal":
        return Focal(loss.gamma)
    if loss.kind == "asymmetric":
        return Asymmetric(loss.gamma_positive, loss.gamma_negative, loss.margin)
    return CrossEntropy(training.label_smoothing)


def build_network(settings: Model, training: Training, inputs: Inputs, n_outputs: int, root: Path) -> torch.nn.Module:
    """The network that is trained: a head for frozen features, a whole network for pixels.

    Raises:
        PleatError: the weights cannot be had or do not fit.
    """
    head = training.head
    if isinstance(settings, FrozenModel):
        return Head(inputs.values.shape[-1], n_outputs, head.hidden, head.dropout)
    if isinstance(settings, CustomCnn):
        return CustomCnnNetwork(settings.plain_blocks, n_outputs, head.hidden, head.dropout, settings.batch_norm)
    from pipeline_steps.vision.timm_networks import load_network  # late: heads on features need no timm

    name, size = settings.backbone, settings.input_size
    if isinstance(settings, ScratchModel):
        return load_network(name, None, False, size, "pooled", n_outputs, head.hidden, head.dropout)
    weights = root / settings.weights if settings.weights else None
    return load_network(name, weights, True, size, settings.head_on, n_outputs, head.hidden, head.dropout)


def fit_on(
    devices: list[torch.device],
    network: torch.nn.Module,
    lesson: Lesson,
    on_epoch: Callable[[Epoch], None],
    on_resume: Callable[[list[Epoch]], None],
) -> Fitted:
    """`engine.fit` on one device, or `distributed.fit` on several; network and lesson are on the CPU before."""
    if len(devices) > 1:
        from pipeline_steps.vision import distributed  # late: one device needs none of it

        return distributed.fit(devices, network, lesson, on_epoch, on_resume)
    network = network.to(devices[0]).to(memory_format=torch.channels_last)
    return fit(network, lesson.to(devices[0]), on_epoch, on_resume)


def schedule(
    settings: Model, training: Training, seed: int, device: torch.device, n_epochs: int | None = None
) -> Schedule:
    """The engine's settings; `n_epochs` where no inner part chooses the epoch."""
    augment = training.augment
    rand = augment.rand_augment
    layer_decay, head_epochs = 1.0, 0
    if isinstance(settings, FinetunedModel):
        layer_decay, head_epochs = settings.layer_decay, settings.head_epochs
    return Schedule(
        n_epochs=n_epochs,
        patience=training.patience,
        batch_size=training.batch_size,
        optimization=Optimization(
            optimizer=training.optimizer,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            layer_decay=layer_decay,
            decay=_decay(training),
            max_epochs=training.max_epochs,
        ),
        weight_average=training.weight_average,
        mirror=training.mirror,
        seed=seed,
        augmentation=Augmentation(
            min_crop=augment.min_crop,
            operations=rand.operations if rand else 0,
            magnitude=rand.magnitude if rand else 0,
            mixup=augment.mixup,
            cutmix=augment.cutmix,
        ),
        head_epochs=head_epochs,
        bfloat16=training.precision == "bfloat16" or (training.precision == "auto" and device.type == "cuda"),
        compile=training.compile,
    )


def _decay(training: Training) -> Decay:
    decay = training.decay
    if decay.kind == "step":
        return StepDecay(decay.every_epochs, decay.rate)
    if decay.kind == "cosine":
        return CosineDecay(decay.warmup_epochs)
    return OneCycle()
