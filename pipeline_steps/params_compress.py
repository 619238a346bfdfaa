"""The block `compress` of params.yaml: the cheaper versions of the refitted model, and which one is registered."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, field_validator, model_validator

from pipeline_steps.params_models import InputSize, Name, Strict

REFITTED = "refitted"  # how tables call the model that all of these are made from
Share = Annotated[float, Field(gt=0, lt=1)]


class Int8(Strict):
    """Weights and activations in 8 bits, by ONNX Runtime's static quantization; nothing is trained.

    Attributes:
        calibration_images: images of the training side whose activations give the ranges.
        of: another technique whose result is quantized; null: the refitted model.
    """

    kind: Literal["int8"]
    calibration_images: Annotated[int, Field(ge=1)] = 256
    of: Name | None = None


class SharedWeights(Strict):
    """Weights of a layer take only so many values (k-means); the file holds indices into them. Nothing is trained.

    Attributes:
        clusters: values a layer; 16 take 4 bits a weight, 64 take 6, 256 take 8.
        of: as for int8.
    """

    kind: Literal["shared_weights"]
    clusters: Annotated[int, Field(ge=2, le=256)]
    of: Name | None = None


class SmallerInput(Strict):
    """The same network, trained anew on smaller images, for as many epochs as the refitted one."""

    kind: Literal["smaller_input"]
    input_size: InputSize


class FewerFilters(Strict):
    """A custom_cnn with `width` times the filters in each block, trained anew for as many epochs as the refitted."""

    kind: Literal["fewer_filters"]
    width: Share


class Pruned(Strict):
    """Whole channels removed, the least important first, then trained on as a whole network.

    Attributes:
        share: of the channels of each layer that go.
        epochs: of training after that; learning rate and batch size are those of that training.
    """

    kind: Literal["pruned"]
    share: Share
    epochs: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(gt=0)] = 0.001
    batch_size: Annotated[int, Field(ge=2)] = 32


class Distilled(Strict):
    """A smaller model that learns the refitted one's answers beside the labels (Hinton, Vinyals & Dean 2015).

    Attributes:
        student: one of `models`; trained as `training` says of it, for all of its `max_epochs`.
        temperature: by which both sides' logits are divided before they are compared.
        soft_share: of the loss that compares the two; the rest is the student's own loss. 0: it learns alone.
    """

    kind: Literal["distilled"]
    student: Name
    temperature: Annotated[float, Field(gt=0)] = 4.0
    soft_share: Annotated[float, Field(ge=0, le=1)] = 0.7


Technique = Annotated[
    Int8 | SharedWeights | SmallerInput | FewerFilters | Pruned | Distilled,
    Discriminator("kind"),
]


class Compress(Strict):
    """Techniques by a name of one's own, and the one whose result is registered (null: the refitted model itself)."""

    techniques: dict[Name, Technique]
    candidate: Name | None

    @field_validator("techniques")
    @classmethod
    def _in_order(cls, techniques: dict[str, Technique]) -> dict[str, Technique]:
        if REFITTED in techniques:
            raise ValueError(f"names '{REFITTED}', which is the model that all of them are made from; use another name")
        dotted = next((name for name in techniques if "." in name), None)
        if dotted is not None:  # index.html would take the place of the page
            raise ValueError(f"names '{dotted}', but its report is a folder beside files, so use a name without dots")
        known: list[str] = []
        in_8_bits: set[str] = set()
        for name, technique in techniques.items():
            of = technique.of if isinstance(technique, Int8 | SharedWeights) else None
            if of is not None and of not in known:
                there = f"; before it there are {', '.join(known)}" if known else ", but it is the first"
                raise ValueError(f"has {name}.of '{of}', which must be a technique listed before it{there}")
            if isinstance(technique, Int8) and of in in_8_bits:
                raise ValueError(f"has {name}.of '{of}', which is in 8 bits already; name another technique, or null")
            if isinstance(technique, Int8) or of in in_8_bits:
                in_8_bits.add(name)
            known.append(name)
        return techniques

    @model_validator(mode="after")
    def _candidate_exists(self) -> "Compress":
        if self.candidate is not None and self.candidate not in self.techniques:
            known = ", ".join(self.techniques) or "none"
            raise ValueError(f"has candidate '{self.candidate}', but its techniques are {known}")
        return self
