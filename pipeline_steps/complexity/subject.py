"""What is profiled: a model of params.yaml with its head, or any network of timm with its own classifier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline_steps.errors import PleatError
from pipeline_steps.params_models import CustomCnn, Head, HeadOn, Model, ScratchModel

if TYPE_CHECKING:
    from torch import Tensor, nn

RANDOM = "random weights"


@dataclass(frozen=True)
class Subject:
    """A network that can be made.

    Attributes:
        name: as people call it.
        input_size: pixels a side.
        about: what it is, a phrase.
        build: makes it on the current device, with random weights.
        trained: makes it with the weights of a .safetensors file, or with its own, and says which.
        see: encoded bytes of an image to what it takes of it, uint8 (3, input_size, input_size).
        normalise: such pixels, as floats (n, 3, height, width), to what `build`'s network takes.
    """

    name: str
    input_size: int
    about: str
    build: "Callable[[], nn.Module]"
    trained: "Callable[[Path | None], tuple[nn.Module, str]]"
    see: "Callable[[bytes], Tensor]"
    normalise: "Callable[[Tensor], Tensor]"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return 3, self.input_size, self.input_size


def of_model(name: str, settings: Model, head: Head, n_outputs: int, input_size: int | None = None) -> Subject:
    """A model of params.yaml, backbone and head; the head has one output for each class of each target.

    Args:
        input_size: pixels a side, instead of the model's own.

    Raises:
        PleatError: timm does not know the network, or it cannot take images of this size.
    """
    if isinstance(settings, CustomCnn):
        return _custom(name, settings, head, n_outputs, input_size)
    from pipeline_steps.vision.timm_networks import load_network, preprocessing  # late: takes seconds

    wanted = input_size or settings.input_size
    head_on: HeadOn = "pooled" if isinstance(settings, ScratchModel) else settings.head_on
    prepared, backbone = preprocessing(settings.backbone, wanted, settings.crop_pct), settings.backbone
    features = "pooled features" if head_on == "pooled" else "logits"
    about = f"{settings.kind} {backbone} with a head of {n_outputs:,} outputs on its {features}"

    def build(weights: Path | None = None) -> "nn.Module":
        pretrained = weights is not None
        return load_network(backbone, weights, pretrained, wanted, head_on, n_outputs, head.hidden, head.dropout)

    def trained(weights: Path | None) -> "tuple[nn.Module, str]":
        if weights is not None:
            return _with_state(build(), weights), f"weights {weights.name}"
        own = None if isinstance(settings, ScratchModel) else settings.weights
        return build(Path(own) if own else None), f"weights {Path(own).name}" if own else RANDOM

    return Subject(name, prepared.crop, about, build, trained, lambda data: prepared((data, False)), _as_it_is)


def _custom(name: str, settings: CustomCnn, head: Head, n_outputs: int, input_size: int | None) -> Subject:
    import torch  # late: takes seconds

    from pipeline_steps.serving.images import decode, resize_crop
    from pipeline_steps.vision.networks import CustomCnn as CustomCnnNetwork

    size = input_size or settings.input_size
    if size < settings.smallest_input:
        raise PleatError(
            f"{name} cannot take images of {size} pixels a side: its pools shrink them down to nothing; use "
            f"{settings.smallest_input} or more."
        )

    def build() -> "nn.Module":
        device = torch.get_default_device()
        with torch.device("cpu"):  # the meta device would load torch's compiler, which takes a second
            network = CustomCnnNetwork(settings.plain_blocks, n_outputs, head.hidden, head.dropout, settings.batch_norm)
        return network.to(device)

    def trained(weights: Path | None) -> "tuple[nn.Module, str]":
        return (_with_state(build(), weights), f"weights {weights.name}") if weights else (build(), RANDOM)

    about = f"the convolutions of params.yaml with a head of {n_outputs:,} outputs"
    return Subject(
        name, size, about, build, trained, lambda data: resize_crop(decode(data, False), size, size), _as_it_is
    )


def of_timm(name: str, input_size: int | None = None, others: Sequence[str] = ()) -> Subject:
    """A timm network with its own classifier, if it has one.

    Args:
        input_size: pixels a side, instead of the network's own.
        others: further names that people could have meant.

    Raises:
        PleatError: timm does not know the name, or the network cannot take images of this size.
    """
    from timm.models import is_model, list_models, resolve_pretrained_cfg  # late: takes seconds

    from pipeline_steps.vision.timm_networks import create, mean_std, n_features, preprocessing
    from pipeline_steps.vision.weights import unknown_model

    if not is_model(name):
        if not others:
            raise unknown_model(name)
        near = get_close_matches(name, [*others, *list_models()], n=5)
        raise PleatError(
            f"Neither params.yaml nor timm has a model named '{name}'; near names: {', '.join(near) or 'none'}."
        )
    n_classes = int(resolve_pretrained_cfg(name).num_classes or 0)
    head_on: HeadOn = "logits" if n_classes else "pooled"
    prepared = preprocessing(name, input_size)
    if input_size:
        n_features(name, input_size, head_on)  # says which sizes it takes
    about = f"timm's network with {f'its own classifier of {n_classes:,} classes' if n_classes else 'no classifier'}"

    def build() -> "nn.Module":
        return create(name, None, False, input_size, head_on)

    def trained(weights: Path | None) -> "tuple[nn.Module, str]":
        if weights is None:
            return build(), RANDOM
        return create(name, weights, True, input_size, head_on), f"weights {weights.name}"

    def normalise(pixels: "Tensor") -> "Tensor":
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) * 255 for values in mean_std(name))
        return (pixels - mean) / std

    return Subject(name, prepared.crop, about, build, trained, lambda data: prepared((data, False)), normalise)


def _as_it_is(pixels: "Tensor") -> "Tensor":
    """The networks of params.yaml take raw pixels."""
    return pixels


def _with_state(network: "nn.Module", weights: Path) -> "nn.Module":
    """With all tensors of a file that training wrote, such as data/train/MODEL/fold_0/weights.safetensors."""
    from safetensors.torch import load_file

    from pipeline_steps.vision.weights import shapes

    if not weights.is_file():
        raise PleatError(f"The weights file {weights} does not exist.")
    found = shapes(weights)
    wanted = {name: tuple(values.shape) for name, values in network.state_dict().items()}
    if found != wanted:
        odd = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise PleatError(
            f"The weights of {weights} do not fit the network (first at {odd[0]}); give a file that training wrote for "
            "this model, such as data/train/MODEL/fold_0/weights.safetensors."
        )
    network.load_state_dict(load_file(weights))
    return network
