"""What is profiled: a model of params.yaml with its head, or any network of timm with its own classifier."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline_steps.errors import PleatError
from pipeline_steps.params_models import CustomCnn, FrozenModel, Head, HeadOn, Model, ScratchModel

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Subject:
    """A network that can be made.

    Attributes:
        name: as people call it.
        input_size: pixels a side.
        n_outputs: of its last layer.
        about: what it is, a sentence without its full stop.
        build: makes it on the current device, with random weights, or with those that it is asked for where there are.
        raw_pixels: it takes pixels of 0 to 255; else normalised ones.
    """

    name: str
    input_size: int
    n_outputs: int
    about: str
    build: "Callable[[], nn.Module]"
    raw_pixels: bool


def of_model(name: str, settings: Model, head: Head, n_outputs: int, input_size: int | None = None) -> Subject:
    """A model of params.yaml, backbone and head; the head has one output for each class of each target.

    Args:
        input_size: pixels a side, instead of the model's own.

    Raises:
        PleatError: timm does not know the network, or it cannot take images of this size.
    """
    if isinstance(settings, CustomCnn):
        from pipeline_steps.vision.networks import CustomCnn as CustomCnnNetwork  # late: torch takes seconds

        size = input_size or settings.input_size
        if size < settings.smallest_input:
            raise PleatError(
                f"{name} cannot take images of {size} pixels a side: its pools shrink them down to nothing; use "
                f"{settings.smallest_input} or more."
            )
        blocks = [(block.filters, block.kernel, block.pool, block.padding) for block in settings.blocks]
        arguments = (blocks, n_outputs, head.hidden, head.dropout, settings.batch_norm)
        about = f"the convolutions of params.yaml with a head of {n_outputs} outputs"
        return Subject(name, size, n_outputs, about, lambda: CustomCnnNetwork(*arguments), True)

    from pipeline_steps.vision.timm_networks import load_network, preprocessing  # late: takes seconds

    wanted = input_size or (None if isinstance(settings, FrozenModel) else settings.input_size)
    head_on = "pooled" if isinstance(settings, ScratchModel) else settings.head_on
    size = preprocessing(settings.backbone, wanted).crop
    about = f"{settings.kind} {settings.backbone} with a head of {n_outputs} outputs on its {head_on} features"
    if head_on == "logits":
        about = f"{settings.kind} {settings.backbone} with a head of {n_outputs} outputs on its logits"
    backbone = settings.backbone

    def build() -> "nn.Module":
        return load_network(backbone, None, False, wanted, head_on, n_outputs, head.hidden, head.dropout)

    return Subject(name, size, n_outputs, about, build, True)


def of_timm(name: str, input_size: int | None = None, weights: Path | None = None) -> Subject:
    """A timm network with its own classifier, if it has one.

    Args:
        input_size: pixels a side, instead of the network's own.
        weights: a .safetensors file; None: random ones.

    Raises:
        PleatError: timm does not know the name, the network cannot take images of this size, or the file does not fit.
    """
    from timm.models import is_model, resolve_pretrained_cfg  # late: takes seconds

    from pipeline_steps.vision.timm_networks import create, n_features, preprocessing
    from pipeline_steps.vision.weights import unknown_model

    if not is_model(name):
        raise unknown_model(name)
    head_on: HeadOn = "logits" if resolve_pretrained_cfg(name).num_classes else "pooled"
    size = preprocessing(name, input_size).crop
    n_outputs = n_features(name, input_size, head_on)
    what = f"its own classifier of {n_outputs} classes" if head_on == "logits" else "no classifier of its own"
    about = f"timm's network with {what}"
    return Subject(
        name, size, n_outputs, about, lambda: create(name, weights, weights is not None, input_size, head_on), False
    )
