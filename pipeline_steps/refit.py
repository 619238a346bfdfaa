"""Stage `refit`: the chosen model, trained on everything but the holdout, scored there and packaged."""

import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pipeline_steps import metrics, model_card, out_of_fold, package, targets
from pipeline_steps.errors import PleatError
from pipeline_steps.files import (
    atomic_folder,
    read_json,
    read_parquet,
    write_csv,
    write_json,
    write_parquet,
    write_text,
)
from pipeline_steps.fitting import build_network, build_objective, fit_on, schedule
from pipeline_steps.metrics import Floats
from pipeline_steps.model_card import Held
from pipeline_steps.packed import read_images
from pipeline_steps.params import Params
from pipeline_steps.params_models import CustomCnn, FrozenModel, Model
from pipeline_steps.progress import say
from pipeline_steps.serving import TRAINED_ON
from pipeline_steps.targets import Target
from pipeline_steps.train import CHECKPOINTS, answers, codes_of, load_inputs
from pipeline_steps.versions import data_version
from pipeline_steps.vision.engine import Epoch, Fitted, Lesson, predict
from pipeline_steps.vision.lease import lease_several
from pipeline_steps.vision.networks import Head


def run(params: Params, root: Path = Path(), on_epoch: Callable[[Epoch], None] = lambda _: None) -> dict[str, Any]:
    """Writes data/refit (package/, holdout/TARGET.parquet, history.csv, metrics.json) and reports/model_card.

    It trains for as many epochs as the folds chose (the median), since nothing is left to choose by. So each class of
    a multilabel target is answered from the threshold on that is best for the out-of-fold predictions of all folds.

    Returns:
        What metrics.json holds: `model`, `epochs`, `n_train`, `n_holdout`, `holdout` and `package` (names of their
        contents) and, where there is a holdout, the headline scores on it, means over the targets, and `targets`, the
        scores of each. An undefined score is None.

    Raises:
        PleatError: the stages before have not run or do not fit together, or the network's weights cannot be had.
    """
    model = str(read_json(root / "data" / "compare" / "chosen.json")["model"])
    settings, training = params.models[model], params.training[model]
    samples = read_parquet(root / "data" / "split" / "folds.parquet")
    inputs, samples, version = load_inputs(root, model, params.experiment.batches, samples)
    learned = targets.of(params.targets, samples)
    codes, objective = codes_of(learned, samples), build_objective(training, learned)
    learn, held = (torch.from_numpy(np.flatnonzero(samples["side"] == side)) for side in ("train", "holdout"))
    epochs = _chosen_epochs(model, params.experiment.folds, root)
    thresholds = [_thresholds(params, model, target, root) if target.multilabel else None for target in learned]
    seed = seed_of(params)

    torch.manual_seed(seed)
    network = build_network(settings, training, inputs, objective.n_outputs, root)
    if isinstance(network, Head):
        torch.set_num_threads(1)
        network.standardise_by(inputs.values[learn])
    checkpoint = root / CHECKPOINTS / model / "refit.pt"

    def report(epoch: Epoch) -> None:
        say(f"refit {model}: epoch {epoch.epoch}/{epochs} train loss {epoch.train_loss:.4f}")
        on_epoch(epoch)

    def go_on(done: list[Epoch]) -> None:
        say(f"refit {model}: going on after epoch {len(done)} of the interrupted run")

    with lease_several(f"refit {model}", training.devices) as devices:
        inputs = inputs if len(devices) > 1 else inputs.to(devices[0])  # once, for training and scoring
        plan = schedule(settings, training, seed, devices[0], epochs)
        lesson = Lesson(objective, inputs, codes, learn, None, plan, checkpoint, version)
        fitted = fit_on(devices, network, lesson, report, go_on)
        network = network.to(devices[0])
        network.load_state_dict(fitted.state)
        answered = torch.empty(0, objective.n_outputs)
        if len(held):
            answered = predict(network, objective, inputs.to(devices[0]), held, training.mirror).cpu()
    network = network.cpu().to(memory_format=torch.contiguous_format)
    rows, parts = samples.iloc[held.numpy()], [part.numpy() for part in objective.split(answered)]
    judged = [
        Held(target, part, metrics.answered(part, chosen), chosen)
        for target, part, chosen in zip(learned, parts, thresholds, strict=True)
    ]
    about = {"model": model, "epochs": epochs, "n_train": len(learn), "n_holdout": len(held)}
    about["holdout"] = _digest(rows, targets.label_columns(params.targets))
    scored = "no holdout"
    if len(held):
        scores = [metrics.headlines(one.target.codes(rows), one.probability, one.predicted) for one in judged]
        about |= numbers(metrics.mean_of_targets(scores))
        about["targets"] = {target.name: numbers(one) for target, one in zip(learned, scores, strict=True)}
        over = f" (mean of {len(learned)} targets)" if len(learned) > 1 else ""
        scored = f"weighted F1 {about['f1_weighted']:.4f}{over} on {len(held):,} of the holdout"
    summary = _write(params, root, network, about, samples, judged, fitted)
    checkpoint.unlink(missing_ok=True)
    say(f"refit {model}: {len(learn):,} samples, {epochs} epochs; {scored}")
    return summary


def seed_of(params: Params) -> int:
    """The seed of a training on the whole training side; the folds have those below."""
    return params.experiment.seed * 1000 + len(params.experiment.folds)


def _chosen_epochs(model: str, folds: list[int], root: Path) -> int:
    """The median of the epochs that the folds' inner parts chose."""
    train = root / "data" / "train" / model
    chosen = [int(read_json(train / f"fold_{fold}" / "metrics.json")["best_epoch"]) for fold in folds]
    return statistics.median_high(chosen)


def _thresholds(params: Params, model: str, target: Target, root: Path) -> Floats:
    """The best threshold of each class of a multilabel target, over the out-of-fold predictions of all folds."""
    found = out_of_fold.read(params, model, target.name, root)
    if found.target.classes != target.classes:
        odd = sorted(set(found.target.classes) ^ set(target.classes)) or ["their order"]
        raise PleatError(
            f"Classes of {model} ({target.name}) differ between its folds and data/split/folds.parquet: "
            f"{', '.join(odd)}. {out_of_fold.MEND}"
        )
    return metrics.best_thresholds(found.actual, found.probability)


def _digest(rows: pd.DataFrame, labels: list[str]) -> str:
    """Names which samples are in the holdout, and what they are."""
    lines = [sample_id + "\0".join(cells) for sample_id, *cells in rows[["sample_id", *labels]].to_numpy()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def numbers(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Scores as JSON holds them: None where they are undefined."""
    return {name: None if np.isnan(value) else float(value) for name, value in scores.items()}


def _write(
    params: Params,
    root: Path,
    network: torch.nn.Module,
    about: dict[str, Any],
    samples: pd.DataFrame,
    judged: Sequence[Held],
    fitted: Fitted,
) -> dict[str, Any]:
    model = about["model"]
    whole, size, preprocessing = whole_network(params.models[model], network, root)
    travels = {
        "model": model,
        "preprocessing": preprocessing,
        "max_pixels": params.ingest.max_pixels,
        "data_version": data_version(params.experiment.batches, root),
    }
    several = {one.target.name: one.thresholds.tolist() for one in judged if one.thresholds is not None}
    if several:
        travels["thresholds"] = several
    trained_on = samples["sample_id"][samples["side"] == "train"]
    rows = samples[samples["side"] == "holdout"]
    card = model_card.collect(params, root, about, samples, judged, travels["data_version"])
    data = root / "data" / "refit"
    with atomic_folder(root / "reports" / "model_card") as reports, atomic_folder(data / "package") as out:
        answering = package.Answering(whole, [one.target for one in judged], params.training[model].mirror)
        package.write(out, answering, size, travels, _example(samples, judged[0].target, root))
        write_text(out / TRAINED_ON, "".join(f"{sample_id}\n" for sample_id in sorted(trained_on)))
        model_card.write(reports, out, card)
        about["package"] = package.digest(out)
    with atomic_folder(data / "holdout") as out:
        for one in judged:
            table = answers(rows, ["sample_id", "batch"], one.target, one.probability)
            table.insert(3, "group", rows["group"].to_numpy())
            write_parquet(out / f"{one.target.name}.parquet", table)
    history = pd.DataFrame([asdict(epoch) for epoch in fitted.history])
    write_csv(data / "history.csv", history[["epoch", "train_loss", "train_accuracy"]])
    write_json(data / "metrics.json", about)
    return about


def whole_network(settings: Model, network: torch.nn.Module, root: Path) -> tuple[torch.nn.Module, int, dict[str, Any]]:
    """The network from pixels to logits, its input size, and the arguments of `resize_crop` that lead there."""
    if isinstance(settings, CustomCnn):
        size = settings.input_size
        return network, size, {"resize": size, "crop": size, "interpolation": "bilinear"}
    if not isinstance(settings, FrozenModel):
        from pipeline_steps.vision.timm_networks import preprocessing

        seen = preprocessing(settings.backbone, settings.input_size, settings.crop_pct)
        return network, seen.crop, asdict(seen)
    from pipeline_steps.vision.backbones import load_backbone

    weights = root / settings.weights if settings.weights else None
    backbone, seen = load_backbone(settings.backbone, weights, settings.head_on, settings.input_size, settings.crop_pct)
    whole = torch.nn.Sequential()
    whole.add_module("backbone", backbone)
    whole.add_module("head", network)
    return whole, seen.crop, asdict(seen)


def _example(samples: pd.DataFrame, target: Target, root: Path) -> bytes:
    """An image of the most frequent class, the same every time; of the holdout where it has one."""
    labels = samples[target.columns[0]]
    rows = samples[labels == labels.mode()[0]].sort_values(["side", "sample_id"])
    first = rows.iloc[0]
    found = read_images(root / "data" / "ingest" / first["batch"] / "images.arrow", [first["sample_id"]])
    return found[first["sample_id"]]
