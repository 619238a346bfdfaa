"""Smaller images: the same network trained anew at another input size."""

from pathlib import Path

from pydantic import ValidationError

from pipeline_steps.complexity.compress.refitted import Made, NotPossibleError, Refitted
from pipeline_steps.complexity.compress.training import Plan, fit_anew
from pipeline_steps.errors import PleatError
from pipeline_steps.params_compress import SmallerInput
from pipeline_steps.params_models import CustomCnn, Model, ScratchModel


def make(refitted: Refitted, name: str, settings: SmallerInput, out: Path) -> Made:
    """Trains the model on images of `input_size` pixels a side, for the epochs of `refit`.

    Raises:
        NotPossibleError: the model sees images of that size or smaller ones already, or its network cannot take them.
        PleatError: the weights cannot be had.
    """
    before, after = refitted.cost["input_size"], settings.input_size
    if after >= before:
        raise NotPossibleError(f"{refitted.model} sees images of {before} pixels a side, and {after} is no smaller")
    try:
        model = type(refitted.settings).model_validate(refitted.settings.model_dump() | {"input_size": after})
    except ValidationError as error:
        raise NotPossibleError(f"{refitted.model} {error.errors()[0]['ctx']['error']}") from None
    _load(refitted.settings, refitted.root)
    try:
        _load(model, refitted.root)
    except PleatError as error:  # of the size, since the network can be had at the size of before
        if error.temporary:
            raise
        raise NotPossibleError(str(error).rstrip(".")) from None
    told = f"images of {after} pixels a side instead of {before}, trained anew"
    return fit_anew(refitted, name, Plan(model, refitted.training, refitted.about["epochs"]), out, told)


def _load(model: Model, root: Path) -> None:
    """Raises what keeps a timm network from being made at the size of `model`."""
    if isinstance(model, CustomCnn):
        return
    from pipeline_steps.vision.timm_networks import load_network  # late: takes seconds

    if isinstance(model, ScratchModel):
        load_network(model.backbone, None, False, model.input_size, "pooled", 1, 0, 0.0)
        return
    weights = root / model.weights if model.weights else None
    load_network(model.backbone, weights, True, model.input_size, model.head_on, 1, 0, 0.0)
