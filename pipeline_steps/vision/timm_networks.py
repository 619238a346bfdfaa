"""timm's networks: built with their weights, the images they want to see, and a whole one with a head for training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models import PretrainedCfg, clean_state_dict, resolve_pretrained_cfg
from torch import Tensor, nn

from pipeline_steps.errors import PleatError
from pipeline_steps.serving.images import decode, resize_crop
from pipeline_steps.vision.networks import Head
from pipeline_steps.vision.weights import check_weights, misfit, shapes, unknown_model

HeadOn = Literal["pooled", "logits"]


@dataclass(frozen=True)
class Preprocessing:
    """What a network was trained to see, as timm records it; the arguments of `images.resize_crop`."""

    resize: int
    crop: int
    interpolation: str

    def __call__(self, image: tuple[bytes, bool]) -> Tensor:
        """Encoded bytes and `plain_jpeg` to uint8 (3, crop, crop)."""
        return resize_crop(decode(*image), self.resize, self.crop, self.interpolation)


class TimmNetwork(nn.Module):
    """A timm network `body` with a `head` on what it gives; takes raw pixels.

    Args:
        body: normalised pixels to (batch, n_features).
        mean: of the pixels that it was trained on, in [0, 1], a colour.
        std: the same.
    """

    def __init__(self, body: nn.Module, head: Head, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)
        self.body = body
        self.head = head

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels of shape (batch, 3, size, size), 0 to 255, to logits (batch, n_outputs)."""
        logits: Tensor = self.head(self.body((pixels.float() - self.mean) / self.std))
        return logits


def load_network(
    name: str,
    weights: Path | None,
    pretrained: bool,
    input_size: int | None,
    head_on: HeadOn,
    n_outputs: int,
    hidden: int,
    dropout: float,
) -> TimmNetwork:
    """A timm network with a new head, which takes the features as they are (its standardisation is the identity).

    Args:
        name: one of timm's, with or without the tag of its weights.
        weights: a .safetensors file; None: timm's hub.
        pretrained: False: random weights; `weights` must be None.
        input_size: pixels a side; None: the network's own.
        head_on: pooled features, or the logits of the network's own classifier.
        n_outputs: of the head; `hidden` and `dropout` as in `Head`.

    Raises:
        PleatError: as `create` and `n_features`.
    """
    head = Head(n_features(name, input_size, head_on), n_outputs, hidden, dropout)
    return TimmNetwork(create(name, weights, pretrained, input_size, head_on), head, *mean_std(name))


def create(name: str, weights: Path | None, pretrained: bool, input_size: int | None, head_on: HeadOn) -> nn.Module:
    """The network as timm makes it, arguments as of `load_network`: normalised pixels to pooled features or logits.

    Raises:
        PleatError: timm does not know the name, the file is absent or does not fit, or the hub cannot be reached.
    """
    own = _configuration(name, head_on)
    n_classes = own.num_classes if head_on == "logits" else 0
    # Only networks that are built for one size take it as an argument.
    size = {"img_size": input_size} if input_size and own.fixed_input_size else {}
    if not pretrained:
        return _of_timm(name, num_classes=n_classes, **size)
    check_weights(name, weights)
    try:
        if weights is None:
            return _of_timm(name, pretrained=True, num_classes=n_classes, **size)
        return _from_file(name, weights, own, head_on, size)
    except RuntimeError as error:
        if not size:
            raise
        raise PleatError(
            f"The weights of {name} are for images of {own.input_size[-1]} pixels a side and cannot be changed to "
            f"input_size {input_size}; set input_size to {own.input_size[-1]}, or leave it out."
        ) from error


def n_features(name: str, input_size: int | None, head_on: HeadOn) -> int:
    """How many numbers the network gives for an image, from a pass on torch's meta device, which computes nothing.

    Raises:
        PleatError: timm does not know the name, or the network has no classifier or cannot take images of this size.
    """
    own_size = int(_configuration(name, head_on).input_size[-1])
    size, patch = input_size or own_size, 1
    try:
        with torch.device("meta"), torch.no_grad():
            network = create(name, None, pretrained=False, input_size=input_size, head_on=head_on).eval()
            patch = _patch(network)
            if size != own_size and size % patch:
                raise ValueError("many networks would leave out the last rows and columns in silence")
            shape = network(torch.zeros(1, 3, size, size)).shape
    except Exception as error:  # each network fails in its own way
        if size == own_size:
            raise
        parts = f"the patches of {patch}" if patch > 1 else "the parts"
        raise PleatError(
            f"{name} cannot take images of {size} pixels a side: that is too small, or no multiple of {parts} that it "
            f"divides them into. Its own size is {own_size}; set input_size to that, or leave it out."
        ) from error
    if len(shape) != 2:
        raise PleatError(f"{name} does not give one vector for an image, which a head needs; use another network.")
    return int(shape[-1])


def preprocessing(name: str, input_size: int | None = None, crop_pct: float | None = None) -> Preprocessing:
    """What becomes of an image before the network.

    Args:
        name: of the network.
        input_size: pixels a side; None: the network's own.
        crop_pct: the share of the image's shorter side that is seen, in (0, 1]; None: the network's own.

    Raises:
        PleatError: timm does not know the name.
    """
    data = timm.data.resolve_data_config(pretrained_cfg=_configuration(name).to_dict())
    crop = input_size or int(data["input_size"][-1])
    return Preprocessing(int(crop / (crop_pct or data["crop_pct"])), crop, data["interpolation"])


def mean_std(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels that the network was trained on, in [0, 1], a colour.

    Raises:
        PleatError: timm does not know the name.
    """
    data = timm.data.resolve_data_config(pretrained_cfg=_configuration(name).to_dict())
    return data["mean"], data["std"]


def _configuration(name: str, head_on: HeadOn = "pooled") -> PretrainedCfg:
    """What timm knows of the network and its weights."""
    if not timm.is_model(name):
        raise unknown_model(name)
    found = resolve_pretrained_cfg(name)
    if head_on == "logits" and not found.num_classes:
        raise PleatError(f"{name} has no classifier of its own, which `head_on: logits` needs; set `head_on: pooled`.")
    return found


def _from_file(name: str, weights: Path, own: PretrainedCfg, head_on: HeadOn, size: dict[str, int]) -> nn.Module:
    classifier = _classifier(own)
    found = clean_state_dict(shapes(weights))
    overlay: dict[str, Any] = {"file": str(weights)}
    n_classes = own.num_classes
    if head_on == "pooled":
        # With the file's own number of classes, timm tells of each tensor that does not fit. With another one it would
        # be silent, and random weights would stay where the file has none.
        n_classes = next((found[key][0] for key in classifier if key in found), 0)
        overlay |= {"num_classes": n_classes, "label_offset": 0}
    try:
        network = _of_timm(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=n_classes, **size)
    except Exception as error:  # what translates other formats fails in its own ways
        with torch.device("meta"):
            state = _of_timm(name, num_classes=n_classes).state_dict()
        told = misfit(name, weights, found, {key: tuple(value.shape) for key, value in state.items()}, classifier)
        if told is None:
            raise
        raise told from error
    if head_on == "pooled" and n_classes:
        network.reset_classifier(0)  # type: ignore[operator]
    return network


def _patch(network: nn.Module) -> int:
    """Pixels a side of the patches that the network divides images into; 1: it does not."""
    size = getattr(getattr(network, "patch_embed", None), "patch_size", 1)
    return int(size if isinstance(size, int) else size[0])


def _of_timm(name: str, **arguments: Any) -> nn.Module:
    network: nn.Module = timm.create_model(name, **arguments)
    return network


def _classifier(own: PretrainedCfg) -> list[str]:
    """Names of the classifier's tensors."""
    layers = [own.classifier] if isinstance(own.classifier, str) else list(own.classifier or ())
    return [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
