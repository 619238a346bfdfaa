"""Smaller images: the same network trained anew at another input size."""

from pathlib import Path

from pydantic import ValidationError

from pipeline_steps.complexity.compress.refitted import Made, NotPossibleError, Refitted
from pipeline_steps.complexity.compress.training import fit_anew
from pipeline_steps.errors import PleatError
from pipeline_steps.params_compress import SmallerInput


def make(refitted: Refitted, name: str, settings: SmallerInput, out: Path) -> Made:
    """Trains the model on images of `input_size` pixels a side, for the epochs of `refit`.

    Raises:
        NotPossibleError: the model sees images of that size or smaller ones already, or its network cannot take them.
    """
    before, after = refitted.cost["input_size"], settings.input_size
    if after >= before:
        raise NotPossibleError(f"{refitted.model} sees images of {before} pixels a side, and {after} is no smaller")
    changed = refitted.settings.model_dump() | {"input_size": after}
    try:
        model = type(refitted.settings).model_validate(changed)
        told = f"images of {after} pixels a side instead of {before}, trained anew"
        return fit_anew(refitted, name, model, refitted.training, refitted.about["epochs"], out, told)
    except ValidationError as error:
        raise NotPossibleError(f"{refitted.model} {error.errors()[0]['ctx']['error']}") from None
    except PleatError as error:
        if error.temporary:
            raise
        raise NotPossibleError(str(error).rstrip(".")) from None
