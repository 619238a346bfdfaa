"""Stage `train`: one fold of one model."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save
from sklearn.model_selection import StratifiedShuffleSplit

from pipeline_steps.errors import PleatError
from pipeline_steps.files import atomic_folder, read_json, read_parquet, write_csv, write_json, write_parquet
from pipeline_steps.metrics import headlines
from pipeline_steps.params import CustomCnn, Model, Params, Training
from pipeline_steps.progress import say
from pipeline_steps.versions import fold_key
from pipeline_steps.vision.engine import Epoch, Fitted, Schedule, fit, predict
from pipeline_steps.vision.inputs import Features, Inputs, Pixels
from pipeline_steps.vision.lease import lease
from pipeline_steps.vision.networks import CustomCnn as CustomCnnNetwork
from pipeline_steps.vision.networks import Head

CHECKPOINTS = Path(".pleat/checkpoints")


def run(
    params: Params, model: str, fold: int, root: Path = Path(), on_epoch: Callable[[Epoch], None] = lambda _: None
) -> None:
    """Writes data/train/MODEL/fold_K: weights.safetensors, predictions.parquet, history.csv, metrics.json.

    The fold's own rows choose nothing: an inner part of the other folds decides when to stop and which epoch stays.

    Raises:
        PleatError: the stages before have not run, or the fold does not exist.
    """
    settings, training = params.models[model], params.training[model]
    samples = read_parquet(root / "data" / "split" / "folds.parquet")
    inputs, samples, version = load_inputs(root, model, params.experiment.batches, samples)
    classes = sorted(samples["label"].unique())
    number = {name: code for code, name in enumerate(classes)}
    codes = torch.tensor([number[label] for label in samples["label"]])
    seed = params.experiment.seed * 1000 + fold
    learn, inner, scored = divide(samples, fold, training.inner_fraction, seed)

    torch.manual_seed(seed)
    network = build_network(settings, training, inputs, len(classes))
    if isinstance(network, Head):
        torch.set_num_threads(1)  # so small that more threads gain nothing, and wait for each other on a busy machine
        network.standardise_by(inputs.values[learn])
    checkpoint = root / CHECKPOINTS / model / f"fold_{fold}.pt"

    def report(epoch: Epoch) -> None:
        say(
            f"train {model} fold {fold}: epoch {epoch.epoch}/{training.max_epochs} train loss {epoch.train_loss:.4f}, "
            f"inner loss {epoch.inner_loss:.4f}, inner weighted F1 {epoch.inner_f1_weighted:.4f}"
        )
        on_epoch(epoch)

    def go_on(epochs: list[Epoch]) -> None:
        say(f"train {model} fold {fold}: going on after epoch {len(epochs)} of the interrupted run")
        for epoch in epochs:
            on_epoch(epoch)

    with lease(f"train {model} fold {fold}") as device:
        inputs, labels = type(inputs)(inputs.values.to(device)), codes.to(device)
        network = network.to(device).to(memory_format=torch.channels_last)
        fitted = fit(
            network, inputs, labels, learn.to(device), inner.to(device), schedule(training, seed), checkpoint, version,
            report, go_on,
        )  # fmt: skip
        network.load_state_dict(fitted.state)
        probabilities = predict(network, inputs, scored.to(device), training.mirror).cpu().numpy()
        key = fold_key(params, model, fold, root)
        _write(root, model, fold, samples.iloc[scored.numpy()], classes, probabilities, fitted, key)
    checkpoint.unlink(missing_ok=True)
    scores = headlines(codes.numpy()[scored.numpy()], probabilities)
    say(
        f"train {model} fold {fold}: weighted F1 {scores['f1_weighted']:.4f}, accuracy {scores['accuracy']:.4f} "
        f"on {len(scored):,} samples (epoch {fitted.best_epoch} of {len(fitted.history)})"
    )


def load_inputs(root: Path, model: str, batches: list[str], samples: pd.DataFrame) -> tuple[Inputs, pd.DataFrame, str]:
    """Loads a model's prepared arrays for the given samples.

    Returns:
        The inputs, one row a sample; the samples in that order (index 0 to n - 1); the contents' version.

    Raises:
        PleatError: a batch was not prepared, or a sample is missing from it.
    """
    arrays, ids, versions, kinds = [], [], [], set()
    for batch in batches:
        folder = root / "data" / "prepare" / model / batch
        about = read_json(folder / "inputs.json")
        wanted = set(samples["sample_id"])
        names = read_json(folder / "sample_ids.json")
        keep = [row for row, name in enumerate(names) if name in wanted]
        arrays.append(np.load(folder / "inputs.npy", mmap_mode="r")[keep])
        ids += [names[row] for row in keep]
        versions.append(about["sha256"])
        kinds.add(about["kind"])
    order = pd.Series(range(len(ids)), index=ids)
    order = order[~order.index.duplicated()]  # a later batch may hold a byte-identical image again
    missing = set(samples["sample_id"]) - set(order.index)
    if missing:
        raise PleatError(
            f"data/prepare/{model} lacks {len(missing)} samples of the folds, such as {min(missing)[:12]}; "
            "run `dvc repro`."
        )
    samples = samples.sort_values("sample_id").reset_index(drop=True)
    values = torch.from_numpy(np.concatenate(arrays)[order.loc[samples["sample_id"]].to_numpy()])
    return (Features(values) if kinds == {"features"} else Pixels(values)), samples, "-".join(versions)


def divide(
    samples: pd.DataFrame, fold: int, inner_fraction: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows to learn from, rows of the inner part, rows of the scored fold: disjoint, int64; the holdout is in none.

    The inner part is stratified and keeps groups whole; classes too small to be split stay in the learning part.

    Raises:
        PleatError: no sample belongs to the fold.
    """
    numbers = samples["fold"].to_numpy()
    scored = np.flatnonzero(numbers == fold)
    if not len(scored):
        raise PleatError(f"Fold {fold} holds no sample; experiment.folds in params.yaml and data/split disagree.")
    others = samples[(numbers != fold) & (numbers >= 0)]
    # One row stands for its group, so that near copies never sit on both sides.
    first = others.drop_duplicates("group")
    sizes = first["label"].map(first["label"].value_counts())
    divisible = first[sizes >= 2]
    n_classes = divisible["label"].nunique()
    n_inner = min(max(round(inner_fraction * len(first)), n_classes), len(divisible) - n_classes)
    if n_inner < 1:
        raise PleatError(
            f"Fold {fold} leaves too few samples to set an inner part aside; use fewer folds or more data."
        )
    splitter = StratifiedShuffleSplit(1, test_size=n_inner, random_state=seed)
    _, chosen = next(splitter.split(divisible, divisible["label"]))
    inside = others["group"].isin(set(divisible["group"].iloc[chosen])).to_numpy()
    learn, inner = others.index.to_numpy()[~inside], others.index.to_numpy()[inside]
    return torch.from_numpy(learn), torch.from_numpy(inner), torch.from_numpy(scored)


def build_network(settings: Model, training: Training, inputs: Inputs, n_classes: int) -> torch.nn.Module:
    """The network that is trained: a head for frozen features, the whole CNN for pixels."""
    head = training.head
    if isinstance(settings, CustomCnn):
        blocks = [(block.filters, block.kernel, block.pool) for block in settings.blocks]
        return CustomCnnNetwork(blocks, n_classes, head.hidden, head.dropout)
    return Head(inputs.values.shape[-1], n_classes, head.hidden, head.dropout)


def schedule(training: Training, seed: int, n_epochs: int | None = None) -> Schedule:
    """The engine's settings; `n_epochs` where no inner part chooses the epoch."""
    return Schedule(
        n_epochs=n_epochs,
        max_epochs=training.max_epochs,
        patience=training.patience,
        batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        label_smoothing=training.label_smoothing,
        balanced=training.class_weights == "balanced",
        weight_average=training.weight_average,
        mirror=training.mirror,
        seed=seed,
    )


def _write(
    root: Path,
    model: str,
    fold: int,
    scored: pd.DataFrame,
    classes: list[str],
    probabilities: np.ndarray,
    fitted: Fitted,
    key: str,
) -> None:
    columns = {f"p:{name}": probabilities[:, code] for code, name in enumerate(classes)}
    keys = scored[["sample_id", "fold", "label"]].reset_index(drop=True)
    with atomic_folder(root / "data" / "train" / model / f"fold_{fold}") as out:
        state = {name: tensor.cpu().contiguous() for name, tensor in fitted.state.items()}
        # One metadata key only: safetensors does not keep the order of several, and the bytes must not vary.
        metadata = {"pleat": json.dumps({"classes": classes, "model": model, "fold": fold})}
        (out / "weights.safetensors").write_bytes(save(state, metadata))
        write_parquet(out / "predictions.parquet", pd.concat([keys, pd.DataFrame(columns)], axis=1))
        write_csv(out / "history.csv", pd.DataFrame([asdict(epoch) for epoch in fitted.history]))
        about = {"best_epoch": fitted.best_epoch, "epochs": len(fitted.history), "key": key}
        write_json(out / "metrics.json", about)
