"""Stage `refit`: the chosen model, trained on everything but the holdout, scored there and packaged."""

import hashlib
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pipeline_steps import model_card, package
from pipeline_steps.files import (
    atomic_folder,
    read_json,
    read_parquet,
    write_csv,
    write_json,
    write_parquet,
    write_text,
)
from pipeline_steps.metrics import headlines
from pipeline_steps.packed import read_images
from pipeline_steps.params import CustomCnn, Model, Params
from pipeline_steps.progress import say
from pipeline_steps.serving import TRAINED_ON
from pipeline_steps.train import CHECKPOINTS, build_network, load_inputs, schedule
from pipeline_steps.versions import data_version
from pipeline_steps.vision.engine import Epoch, Fitted, fit, predict
from pipeline_steps.vision.lease import lease
from pipeline_steps.vision.networks import Head

TARGET = "label"


def run(params: Params, root: Path = Path(), on_epoch: Callable[[Epoch], None] = lambda _: None) -> dict[str, Any]:
    """Writes data/refit (package/, holdout.parquet, history.csv, metrics.json) and reports/model_card.

    It trains for as many epochs as the folds chose (the median), since nothing is left to choose by.

    Returns:
        What metrics.json holds: `model`, `epochs`, `n_train`, `n_holdout`, `package` (a name of its contents) and the
        headline scores on the holdout where there is one, None where undefined.

    Raises:
        PleatError: the stages before have not run, or the backbone's weights cannot be had.
    """
    model = str(read_json(root / "data" / "compare" / "chosen.json")["model"])
    settings, training = params.models[model], params.training[model]
    samples = read_parquet(root / "data" / "split" / "folds.parquet")
    inputs, samples, version = load_inputs(root, model, params.experiment.batches, samples)
    classes = sorted(samples["label"].unique())
    codes = torch.tensor([classes.index(label) for label in samples["label"]])
    learn, held = (torch.from_numpy(np.flatnonzero(samples["side"] == side)) for side in ("train", "holdout"))
    epochs = _chosen_epochs(model, params.experiment.folds, root)
    seed = params.experiment.seed * 1000 + len(params.experiment.folds)  # the folds have those below

    torch.manual_seed(seed)
    network = build_network(settings, training, inputs, len(classes))
    if isinstance(network, Head):
        torch.set_num_threads(1)
        network.standardise_by(inputs.values[learn])
    checkpoint = root / CHECKPOINTS / model / "refit.pt"

    def report(epoch: Epoch) -> None:
        say(f"refit {model}: epoch {epoch.epoch}/{epochs} train loss {epoch.train_loss:.4f}")
        on_epoch(epoch)

    def go_on(done: list[Epoch]) -> None:
        say(f"refit {model}: going on after epoch {len(done)} of the interrupted run")

    with lease(f"refit {model}") as device:
        inputs, labels = type(inputs)(inputs.values.to(device)), codes.to(device)
        network = network.to(device).to(memory_format=torch.channels_last)
        fitted = fit(
            network, inputs, labels, learn.to(device), None, schedule(training, seed, epochs), checkpoint, version,
            report, go_on,
        )  # fmt: skip
        network.load_state_dict(fitted.state)
        answered = torch.empty(0, len(classes))
        if len(held):
            answered = predict(network, inputs, held.to(device), training.mirror).cpu()
    network = network.cpu().to(memory_format=torch.contiguous_format)
    holdout = samples.iloc[held.numpy()].reset_index(drop=True)
    holdout = holdout[["sample_id", "batch", "label", "group"]].assign(
        **{f"p:{name}": answered[:, code].numpy() for code, name in enumerate(classes)}
    )
    scores: dict[str, float | None] = {}
    if len(held):
        found = headlines(codes.numpy()[held.numpy()], answered.numpy())
        scores = {name: None if np.isnan(value) else float(value) for name, value in found.items()}
    about = {"model": model, "epochs": epochs, "n_train": len(learn), "n_holdout": len(held), **scores}
    about["holdout"] = hashlib.sha256("".join(holdout["sample_id"] + holdout["label"]).encode()).hexdigest()
    summary = _write(params, root, network, about, samples, classes, holdout, fitted)
    checkpoint.unlink(missing_ok=True)
    scored = f"weighted F1 {scores['f1_weighted']:.4f} on {len(held):,} of the holdout" if scores else "no holdout"
    say(f"refit {model}: {len(learn):,} samples, {epochs} epochs; {scored}")
    return summary


def _chosen_epochs(model: str, folds: list[int], root: Path) -> int:
    """The median of the epochs that the folds' inner parts chose."""
    train = root / "data" / "train" / model
    chosen = [int(read_json(train / f"fold_{fold}" / "metrics.json")["best_epoch"]) for fold in folds]
    return statistics.median_high(chosen)


def _write(
    params: Params,
    root: Path,
    network: torch.nn.Module,
    about: dict[str, Any],
    samples: pd.DataFrame,
    classes: list[str],
    holdout: pd.DataFrame,
    fitted: Fitted,
) -> dict[str, Any]:
    model = about["model"]
    whole, size, preprocessing = _whole(params.models[model], network, root)
    travels = {
        "model": model,
        "classes": {TARGET: classes},
        "preprocessing": preprocessing,
        "max_pixels": params.ingest.max_pixels,
        "data_version": data_version(params.experiment.batches, root),
    }
    trained_on = samples["sample_id"][samples["side"] == "train"]
    card = model_card.collect(params, root, about, samples, classes, holdout, travels)
    data = root / "data" / "refit"
    with atomic_folder(root / "reports" / "model_card") as reports, atomic_folder(data / "package") as out:
        answering = package.Answering(whole, params.training[model].mirror)
        package.write(out, answering, size, travels, _example(samples, root))
        write_text(out / TRAINED_ON, "".join(f"{sample_id}\n" for sample_id in sorted(trained_on)))
        model_card.write(reports, out, card)
        about["package"] = package.digest(out)
    write_parquet(data / "holdout.parquet", holdout)
    write_csv(data / "history.csv", pd.DataFrame([asdict(epoch) for epoch in fitted.history])[["epoch", "train_loss"]])
    write_json(data / "metrics.json", about)
    return about


def _whole(settings: Model, network: torch.nn.Module, root: Path) -> tuple[torch.nn.Module, int, dict[str, Any]]:
    """The network from pixels to logits, its input size, and the arguments of `resize_crop` that lead there."""
    if isinstance(settings, CustomCnn):
        size = settings.input_size
        return network, size, {"resize": size, "crop": size, "interpolation": "bilinear"}
    from pipeline_steps.vision.backbones import load_backbone

    backbone, preprocessing = load_backbone(settings.backbone, root / settings.weights if settings.weights else None)
    whole = torch.nn.Sequential()
    whole.add_module("backbone", backbone)
    whole.add_module("head", network)
    return whole, preprocessing.crop, asdict(preprocessing)


def _example(samples: pd.DataFrame, root: Path) -> bytes:
    """An image of the most frequent class, the same every time; of the holdout where it has one."""
    rows = samples[samples["label"] == samples["label"].mode()[0]].sort_values(["side", "sample_id"])
    first = rows.iloc[0]
    found = read_images(root / "data" / "ingest" / first["batch"] / "images.arrow", [first["sample_id"]])
    return found[first["sample_id"]]
