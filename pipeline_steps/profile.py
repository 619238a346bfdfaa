"""What models cost: the stage `profile`, and `pleat profile NAME [NAME]` for people."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pipeline_steps import targets
from pipeline_steps.errors import PleatError
from pipeline_steps.files import read_parquet, write_json
from pipeline_steps.packed import read_images
from pipeline_steps.params import Params
from pipeline_steps.progress import say

if TYPE_CHECKING:
    from pipeline_steps.complexity.subject import Subject

N_OUTPUTS = 1000  # of a model of params.yaml where no data says how many classes there are


def run(params: Params, model: str, root: Path = Path()) -> dict[str, int]:
    """Writes data/profile/MODEL.json (params, macs, input_size) and the report reports/complexity/MODEL.

    All figures are of one image, head included. data/profile holds nothing that is measured, so that it is the same
    each time and nothing after it runs again; the report has times and the effective receptive field too, where
    `profile` of params.yaml asks for them.

    Raises:
        PleatError: timm does not know the network, or it cannot take images of this size.
    """
    from pipeline_steps.complexity import report, totals
    from pipeline_steps.complexity.effective import NoEffectiveFieldError
    from pipeline_steps.complexity.subject import of_model
    from pipeline_steps.vision.lease import lease

    rows = read_parquet(root / "data" / "split" / "folds.parquet")
    n_outputs = _outputs(params, rows)
    subject = of_model(model, params.models[model], params.training[model].head, n_outputs)
    images = _of_data(rows, params.profile.images, root)
    with lease(f"profile {model}") if params.profile.latency else nullcontext():
        try:
            profile = report.make(subject, params.profile.latency, images)
        except NoEffectiveFieldError as error:
            say(str(error))
            profile = report.make(subject, params.profile.latency)
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
        PleatError: a name is not known or is named twice, or a network cannot take images of this size.
    """
    from pipeline_steps.complexity import effective, report, terminal

    if len(names) > 2:
        raise PleatError(f"pleat profile sets two models side by side at most, but {len(names)} were named.")
    if len(set(names)) < len(names):
        raise PleatError(
            f"pleat profile sets two different models side by side, but both are {names[0]}; name it once."
        )
    if input_size is not None and input_size < 1:
        raise PleatError(f"Expected --input-size to be at least 1, but got {input_size}.")
    if weights and (len(names) > 1 or images is None):
        raise PleatError(
            "`--weights FILE` is for the effective receptive field of one model; name one and give `--images`."
        )
    subjects = [_subject(name, params, input_size, root) for name in names]
    seen = {str(file): file.read_bytes() for file in effective.image_files(images)} if images else {}
    profiles = [report.make(subject, timed, seen, weights) for subject in subjects]
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


def _of_data(rows: pd.DataFrame, n: int, root: Path) -> dict[str, bytes]:
    """Encoded images of the training data by sample_id, evenly spread over the ids."""
    rows = rows[rows["side"] != "holdout"].sort_values("sample_id")
    rows = rows.iloc[np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)]
    found: dict[str, bytes] = {}
    for batch, ids in rows.groupby("batch")["sample_id"]:
        found |= read_images(root / "data" / "ingest" / str(batch) / "images.arrow", list(ids))
    return found


def _outputs(params: Params, rows: pd.DataFrame) -> int:
    return sum(len(target.classes) for target in targets.of(params.targets, rows))
