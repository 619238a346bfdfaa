"""What models cost: the stage `profile`, and `pleat profile NAME [NAME]` for people."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from pipeline_steps import targets
from pipeline_steps.errors import PleatError
from pipeline_steps.files import read_parquet, write_json
from pipeline_steps.params import Params
from pipeline_steps.progress import say

if TYPE_CHECKING:
    from pipeline_steps.complexity.subject import Subject

N_OUTPUTS = 1000  # of a model of params.yaml where no data says how many classes there are


def run(params: Params, model: str, root: Path = Path()) -> dict[str, int]:
    """Writes data/profile/MODEL.json (params, macs, input_size) and the report reports/complexity/MODEL.

    All figures are of one image, head included. Nothing is timed, so that the results are the same each time.

    Raises:
        PleatError: timm does not know the network, or it cannot take images of this size.
    """
    from pipeline_steps.complexity import report, totals
    from pipeline_steps.complexity.subject import of_model

    rows = read_parquet(root / "data" / "split" / "folds.parquet")
    n_outputs = _outputs(params, rows)
    subject = of_model(model, params.models[model], params.training[model].head, n_outputs)
    profile = report.make(subject)
    report.write(root / "reports" / "complexity" / model, [profile])
    found = totals.summary(profile.totals, subject)
    write_json(root / "data" / "profile" / f"{model}.json", found)
    say(
        f"profile {model}: {found['params'] / 1e6:,.2f} M parameters, {found['macs'] / 1e6:,.1f} M MACs "
        f"at {found['input_size']} pixels"
    )
    return found


def show(
    names: Sequence[str],
    params: Params | None,
    input_size: int | None = None,
    timed: bool = False,
    images: Path | None = None,
    weights: Path | None = None,
    root: Path = Path(),
) -> Path:
    """Prints what one network costs, or two side by side, and writes reports/profile/NAME or NAME-NAME.

    Args:
        names: models of params.yaml, or timm networks.
        params: None: there is no params.yaml here.
        input_size: pixels a side, instead of each network's own.
        timed: measure how long they take, too.
        images: a folder of images for the effective receptive field; None: leave it out.
        weights: a .safetensors file for that, of the one network.

    Returns:
        The folder.

    Raises:
        PleatError: a name is not known, or a network cannot take images of this size.
    """
    from pipeline_steps.complexity import report, terminal

    if len(names) > 2:
        raise PleatError(f"pleat profile sets two models side by side at most, but {len(names)} were named.")
    if weights and (len(names) > 1 or images is None):
        raise PleatError(
            "`--weights FILE` is for the effective receptive field of one model; name one and give `--images`."
        )
    subjects = [_subject(name, params, input_size, root) for name in names]
    profiles = [report.make(subject, timed, images, weights) for subject in subjects]
    folder = root / "reports" / "profile" / "-".join(names)
    report.write(folder, profiles)
    terminal.show(profiles)
    say(f"Report: {folder / 'index.html'}; every layer: {folder / 'layers.csv'}")
    return folder


def _subject(name: str, params: Params | None, input_size: int | None, root: Path) -> "Subject":
    from pipeline_steps.complexity.subject import of_model, of_timm

    models = [model for model in params.models if model in params.training] if params else []
    if params is None or name not in models:
        return of_timm(name, input_size, models)
    split = root / "data" / "split" / "folds.parquet"
    n_outputs = _outputs(params, read_parquet(split)) if split.exists() else N_OUTPUTS
    if not split.exists():
        say(f"No data is split here, so the head of {name} is counted with {N_OUTPUTS:,} outputs.")
    return of_model(name, params.models[name], params.training[name].head, n_outputs, input_size)


def _outputs(params: Params, rows: pd.DataFrame) -> int:
    return sum(len(target.classes) for target in targets.of(params.targets, rows))
