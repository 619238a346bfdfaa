"""The blocks `models` and `training` of params.yaml: what is trained, and how.

What has a default here may be left out of params.yaml.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, model_validator

# Names become folders, DVC stage names (`train@MODEL-FOLD`) and MLflow run names.
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.]*$"
Name = Annotated[str, Field(pattern=NAME, max_length=80)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Factor = Annotated[float, Field(gt=0, le=1)]
InputSize = Annotated[int, Field(ge=8)]
HeadOn = Literal["pooled", "logits"]


class Strict(BaseModel):
    """Base of every block: no unknown keys, no silent conversions, no changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Head(Strict):
    """The classifier on pooled features: linear where `hidden` is 0, else with one hidden layer of that width."""

    hidden: Annotated[int, Field(ge=0)]
    dropout: Fraction


class CrossEntropy(Strict):
    """Softmax cross entropy; binary cross entropy in a multilabel target."""

    kind: Literal["cross_entropy"]


class Focal(Strict):
    """Focal loss (Lin et al. 2017); `gamma: 0` is cross entropy."""

    kind: Literal["focal"]
    gamma: Annotated[float, Field(ge=0)]


class Asymmetric(Strict):
    """Asymmetric loss for multilabel targets (Ridnik et al. 2021)."""

    kind: Literal["asymmetric"]
    gamma_positive: Annotated[float, Field(ge=0)]
    gamma_negative: Annotated[float, Field(ge=0)]
    margin: Fraction


Loss = Annotated[CrossEntropy | Focal | Asymmetric, Discriminator("kind")]


class OneCycle(Strict):
    """Up over the first fifth of the epochs, then down along a cosine (Smith & Topin 2018)."""

    kind: Literal["one_cycle"]


class Steps(Strict):
    """Times `rate` after every `every_epochs` epochs; timm's `step`."""

    kind: Literal["step"]
    every_epochs: Annotated[int, Field(ge=1)]
    rate: Factor


class Cosine(Strict):
    """Up in a line over `warmup_epochs`, then down along a cosine to zero; timm's `cosine`."""

    kind: Literal["cosine"]
    warmup_epochs: Annotated[int, Field(ge=0)]


Decay = Annotated[OneCycle | Steps | Cosine, Discriminator("kind")]


class RandAugment(Strict):
    """Random changes of colour and shape (Cubuk et al. 2020), `operations` of them in a row."""

    operations: Annotated[int, Field(ge=1, le=14)]
    magnitude: Annotated[int, Field(ge=0, le=30)]


class Augment(Strict):
    """What is done to pixels in training, beside mirroring; as it stands: nothing.

    Attributes:
        min_crop: the smallest share of the image's area that a random crop keeps; 1: no crops.
        mixup: alpha of the Beta distribution that two images are blended by (Zhang et al. 2018); 0: none are.
        cutmix: alpha of the one that a cut-out part's area is drawn from (Yun et al. 2019); 0: none are cut. With both,
            each batch takes one of them by chance.
    """

    min_crop: Factor = 1.0
    rand_augment: RandAugment | None = None
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0


class Training(Strict):
    """Head and training loop; the same for a head on frozen features and for a network on pixels.

    Attributes:
        optimizer: any name of timm.optim.
        decay: how the learning rate changes over `max_epochs`.
        augment: for models that are trained on pixels.
        precision: of what is computed in training; auto is bfloat16 on a GPU and float32 on a CPU. Weights are float32.
        compile: by torch.compile; takes minutes before the first step.
        devices: over how many each batch is spread.
    """

    head: Head
    max_epochs: Annotated[int, Field(ge=1)]
    patience: Annotated[int, Field(ge=1)]
    inner_fraction: Annotated[float, Field(gt=0, le=0.5)]
    batch_size: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    loss: Loss
    label_smoothing: Fraction
    class_weights: Literal["none", "balanced", "inverse"]
    weight_average: Fraction
    mirror: bool
    optimizer: str = "adamw"
    decay: Decay = OneCycle(kind="one_cycle")
    augment: Augment = Augment()
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    devices: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _batches_can_be_spread(self) -> "Training":
        if self.batch_size % self.devices:
            raise ValueError(
                f"has batch_size {self.batch_size}, which {self.devices} devices cannot share evenly; "
                f"use a multiple of {self.devices}"
            )
        return self

    @model_validator(mode="after")
    def _smoothing_fits_the_loss(self) -> "Training":
        if self.label_smoothing and self.loss.kind != "cross_entropy":
            raise ValueError(
                f"has label_smoothing {self.label_smoothing:g} with `loss.kind: {self.loss.kind}`, but only "
                "cross_entropy can smooth labels; set label_smoothing to 0"
            )
        return self


class TimmModel(Strict):
    """What models share that are networks of timm.

    Attributes:
        input_size: pixels a side; null: timm's own for this network.
        crop_pct: the share of an image's shorter side that the network sees, from the middle; 1: nothing is cut off it;
            null: timm's own.
    """

    backbone: str
    input_size: InputSize | None = None
    crop_pct: Factor | None = None


class FrozenModel(TimmModel):
    """A timm network that is never updated, with a head trained on what it gives.

    Attributes:
        head_on: pooled features, or the logits of the classes that the network was pre-trained on.
    """

    kind: Literal["frozen"]
    weights: str | None
    head_on: HeadOn = "pooled"


class FinetunedModel(TimmModel):
    """A pre-trained timm network that is trained on as a whole, with a new head.

    Attributes:
        weights: null: from timm's hub; or a .safetensors file.
        head_epochs: first epochs in which only the head learns; 0: all from the start.
        layer_decay: factor of the learning rate from each layer to the one below it; 1: the same for all.
    """

    kind: Literal["finetuned"]
    weights: str | None
    head_on: HeadOn = "pooled"
    head_epochs: Annotated[int, Field(ge=0)] = 0
    layer_decay: Factor = 1.0


class ScratchModel(TimmModel):
    """A timm network that is trained from random weights."""

    kind: Literal["scratch"]


class Block(Strict):
    """One convolution, batch norm (where the network has it) and ReLU, followed by max pooling where `pool` > 1.

    Attributes:
        padding: "same" keeps the size, "valid" takes `kernel` - 1 pixels off each side's length.
    """

    filters: Annotated[int, Field(ge=1)]
    kernel: Annotated[int, Field(ge=1)]
    pool: Annotated[int, Field(ge=1)]
    padding: Literal["same", "valid"] = "same"


class CustomCnn(Strict):
    """A plain convolutional network trained from scratch on pixels."""

    kind: Literal["custom_cnn"]
    input_size: InputSize
    blocks: Annotated[list[Block], Field(min_length=1)]
    batch_norm: bool = True

    @property
    def plain_blocks(self) -> list[tuple[int, int, int, str]]:
        """The blocks as `vision.networks.CustomCnn` takes them."""
        return [(block.filters, block.kernel, block.pool, block.padding) for block in self.blocks]

    @property
    def smallest_input(self) -> int:
        """Pixels a side from which on something is left after the last block."""
        side = 1
        for block in reversed(self.blocks):
            side = side * block.pool + (block.kernel - 1 if block.padding == "valid" else 0)
        return side

    @model_validator(mode="after")
    def _blocks_fit(self) -> "CustomCnn":
        if self.input_size < self.smallest_input:
            raise ValueError(
                f"shrinks an input of {self.input_size} pixels down to nothing; "
                f"use input_size {self.smallest_input} or more, or fewer or smaller pools"
            )
        return self


Model = Annotated[FrozenModel | FinetunedModel | ScratchModel | CustomCnn, Discriminator("kind")]
