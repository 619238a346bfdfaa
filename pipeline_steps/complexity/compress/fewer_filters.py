"""Fewer filters: a narrower network of the same depth, trained anew."""

from pathlib import Path

from pipeline_steps.complexity.compress.refitted import Made, NotPossibleError, Refitted
from pipeline_steps.complexity.compress.training import Plan, fit_anew
from pipeline_steps.params_compress import FewerFilters
from pipeline_steps.params_models import CustomCnn


def make(refitted: Refitted, name: str, settings: FewerFilters, out: Path) -> Made:
    """Trains a `custom_cnn` with `width` times the filters in each block, for the epochs of `refit`.

    Raises:
        NotPossibleError: it is a timm network, of which a narrower one has another name and its own pre-trained weights
            there; or no block loses a filter.
    """
    model = refitted.settings
    if not isinstance(model, CustomCnn):
        raise NotPossibleError(
            f"{refitted.model} is a timm network, whose narrower versions have names and weights of their own; give "
            "one of them as a model in `models`, or remove channels with kind pruned"
        )
    filters = [max(1, round(settings.width * block.filters)) for block in model.blocks]
    before = [block.filters for block in model.blocks]
    if filters == before:
        raise NotPossibleError(
            f"{settings.width:g} of the filters of {refitted.model} ({_listed(before)}), rounded, are as many as before"
        )
    blocks = [block.model_copy(update={"filters": n}) for block, n in zip(model.blocks, filters, strict=True)]
    plan = Plan(model.model_copy(update={"blocks": blocks}), refitted.training, refitted.about["epochs"])
    told = f"{_listed(filters)} filters instead of {_listed(before)}, trained anew"
    return fit_anew(refitted, name, plan, out, told)


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
