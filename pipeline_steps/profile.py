"""Stage `profile`: what one model costs, as totals."""

from pathlib import Path

from pipeline_steps import targets
from pipeline_steps.complexity.totals import count
from pipeline_steps.files import read_parquet, write_json
from pipeline_steps.params import Params
from pipeline_steps.progress import say


def run(params: Params, model: str, root: Path = Path()) -> dict[str, int]:
    """Writes data/profile/MODEL.json: parameters and multiply-accumulates of one image, head included, and input size.

    Raises:
        PleatError: timm does not know the network, or it cannot take images of this size.
    """
    found = targets.of(params.targets, read_parquet(root / "data" / "split" / "folds.parquet"))
    n_outputs = sum(len(target.classes) for target in found)
    totals = count(params.models[model], params.training[model].head, n_outputs)
    write_json(root / "data" / "profile" / f"{model}.json", totals)
    say(
        f"profile {model}: {totals['params'] / 1e6:,.2f} M parameters, {totals['macs'] / 1e6:,.1f} M MACs "
        f"at {totals['input_size']} pixels"
    )
    return totals
