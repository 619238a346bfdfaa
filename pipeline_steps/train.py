"""Stage `train`: one fold of one model."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from safetensors.torch import save
from sklearn.model_selection import StratifiedShuffleSplit

from pipeline_steps import targets
from pipeline_steps.errors import PleatError
from pipeline_steps.files import atomic_folder, read_json, read_parquet, write_csv, write_json, write_parquet
from pipeline_steps.fitting import build_network, build_objective, fit_on, schedule
from pipeline_steps.params import Params
from pipeline_steps.progress import say
from pipeline_steps.targets import Target
from pipeline_steps.versions import fold_key
from pipeline_steps.vision.engine import Epoch, Fitted, Lesson, predict
from pipeline_steps.vision.inputs import CPU, Arrays, Features, Inputs, Pixels
from pipeline_steps.vision.lease import lease_several
from pipeline_steps.vision.networks import Head

CHECKPOINTS = Path(".pleat/checkpoints")
# Of the memory that is free. Larger sets of pixels stay on disk, where the system keeps in memory what is read often,
# once for all folds that train side by side.
MEMORY_SHARE = 0.25
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def run(
    params: Params, model: str, fold: int, root: Path = Path(), on_epoch: Callable[[Epoch], None] = lambda _: None
) -> None:
    """Writes data/train/MODEL/fold_K: weights.safetensors, predictions/TARGET.parquet, history.csv, metrics.json.

    The fold's own rows choose nothing: an inner part of the other folds decides when to stop and which epoch stays.

    Raises:
        PleatError: the stages before have not run, the fold does not exist, or the weights to start from cannot be had.
    """
    settings, training = params.models[model], params.training[model]
    samples = read_parquet(root / "data" / "split" / "folds.parquet")
    inputs, samples, version = load_inputs(root, model, params.experiment.batches, samples)
    learned = targets.of(params.targets, samples)
    codes, objective = codes_of(learned, samples), build_objective(training, learned)
    seed = params.experiment.seed * 1000 + fold
    learn, inner, scored = divide(samples, learned, fold, training.inner_fraction, seed)
    for target in learned:
        absent = ", ".join(_absent(target, samples.iloc[learn.numpy()]))
        if absent:
            say(f"train {model} fold {fold}: warning: target {target.name} has no sample to learn {absent} from")

    torch.manual_seed(seed)
    network = build_network(settings, training, inputs, objective.n_outputs, root)
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

    with lease_several(f"train {model} fold {fold}", training.devices) as devices:
        inputs = inputs if len(devices) > 1 else inputs.to(devices[0])  # once, for training and scoring
        plan = schedule(settings, training, seed, devices[0])
        lesson = Lesson(objective, inputs, codes, learn, inner, plan, checkpoint, version)
        fitted = fit_on(devices, network, lesson, report, go_on)
        network = network.to(devices[0])
        network.load_state_dict(fitted.state)
        probabilities = predict(network, objective, inputs.to(devices[0]), scored, training.mirror).cpu()
        predictions = [
            answers(samples.iloc[scored.numpy()], ["sample_id", "fold"], target, part.numpy())
            for target, part in zip(learned, objective.split(probabilities), strict=True)
        ]
        _write(root, model, fold, learned, predictions, fitted, fold_key(params, model, fold, root))
    checkpoint.unlink(missing_ok=True)
    truth = codes[scored]
    say(
        f"train {model} fold {fold}: weighted F1 {objective.score(probabilities, truth):.4f}, "
        f"accuracy {objective.accuracy(probabilities, truth):.4f} on {len(scored):,} samples "
        f"(epoch {fitted.best_epoch} of {len(fitted.history)})"
    )


def load_inputs(root: Path, model: str, batches: list[str], samples: pd.DataFrame) -> tuple[Inputs, pd.DataFrame, str]:
    """A model's prepared arrays for the given samples: features in memory, pixels there only where they are few.

    Returns:
        The inputs, one row a sample; the samples in that order (index 0 to n - 1); the contents' version.

    Raises:
        PleatError: a batch was not prepared, or a sample is missing from it.
    """
    arrays, places, ids, versions, kinds = [], [], [], [], set()
    for number, batch in enumerate(batches):
        folder = root / "data" / "prepare" / model / batch
        about = read_json(folder / "inputs.json")
        wanted = set(samples["sample_id"])
        names = read_json(folder / "sample_ids.json")
        keep = [row for row, name in enumerate(names) if name in wanted]
        arrays.append(np.load(folder / "inputs.npy", mmap_mode="r"))
        places += [(number, row) for row in keep]
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
    part, row = np.array(places)[order.loc[samples["sample_id"]]].T
    values = Arrays(tuple(arrays), part, row)
    inputs: Inputs
    if kinds == {"features"}:
        inputs = Features(values.to(CPU))
    elif values.nbytes > MEMORY_SHARE * _free_memory():
        inputs = Pixels(values)
    else:
        inputs = Pixels(values.to(CPU))
    return inputs, samples, "-".join(versions)


def _free_memory() -> int:
    """Bytes; at most what a container may take in all (cgroup v2), since the machine's free memory is not its own."""
    free = int(psutil.virtual_memory().available)
    limit = CONTAINER_LIMIT.read_text().strip() if CONTAINER_LIMIT.is_file() else "max"
    return free if limit == "max" else min(free, int(limit))


def codes_of(targets: Sequence[Target], samples: pd.DataFrame) -> torch.Tensor:
    """What each sample is, int64 (n, k), in the columns of `Objective`."""
    return torch.from_numpy(np.column_stack([target.codes(samples) for target in targets]))


def divide(
    samples: pd.DataFrame, targets: Sequence[Target], fold: int, inner_fraction: float, seed: int
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
    strata = _strata(first, targets, inner_fraction)
    strata = strata[strata.map(strata.value_counts()) >= 2]
    n_inner = min(max(round(inner_fraction * len(first)), strata.nunique()), len(strata) - strata.nunique())
    if n_inner < 1:
        raise PleatError(
            f"Fold {fold} leaves too few samples to set an inner part aside; use fewer folds or more data."
        )
    splitter = StratifiedShuffleSplit(1, test_size=n_inner, random_state=seed)
    _, chosen = next(splitter.split(strata, strata))
    inside = others["group"].isin(set(first["group"].loc[strata.index[chosen]])).to_numpy()
    learn, inner = others.index.to_numpy()[~inside], others.index.to_numpy()[inside]
    return torch.from_numpy(learn), torch.from_numpy(inner), torch.from_numpy(scored)


def _strata(rows: pd.DataFrame, targets: Sequence[Target], inner_fraction: float) -> pd.Series:
    """What the inner part takes its share of: each class, or each combination of labels.

    Combinations that are too rare for one sample in the inner part are one stratum, so that several targets with many
    classes do not force their rarest combinations into it.
    """
    columns = list(dict.fromkeys(column for target in targets for column in target.columns))
    strata = rows.groupby(columns).ngroup()
    if len(columns) == 1:
        return strata
    return strata.where(strata.map(strata.value_counts()) * inner_fraction >= 1, -1)


def _absent(target: Target, rows: pd.DataFrame) -> list[str]:
    """The target's classes that none of the rows has."""
    return sorted(set(target.classes) - set(rows[target.columns].to_numpy(dtype=object).ravel()))


def answers(rows: pd.DataFrame, keys: list[str], target: Target, probabilities: np.ndarray) -> pd.DataFrame:
    """The columns `keys` of the rows, then `label` as `Target.labels` and p:CLASS from probabilities (n, n_classes)."""
    columns = {f"p:{name}": probabilities[:, code] for code, name in enumerate(target.classes)}
    known = rows[keys].assign(label=target.labels(rows)).reset_index(drop=True)
    return pd.concat([known, pd.DataFrame(columns)], axis=1)


def _write(
    root: Path,
    model: str,
    fold: int,
    learned: Sequence[Target],
    predictions: Sequence[pd.DataFrame],
    fitted: Fitted,
    key: str,
) -> None:
    with atomic_folder(root / "data" / "train" / model / f"fold_{fold}") as out:
        state = {name: tensor.cpu().contiguous() for name, tensor in fitted.state.items()}
        classes = {target.name: target.classes for target in learned}
        # One metadata key only: safetensors does not keep the order of several, and the bytes must not vary.
        metadata = {"pleat": json.dumps({"classes": classes, "model": model, "fold": fold})}
        (out / "weights.safetensors").write_bytes(save(state, metadata))
        for target, frame in zip(learned, predictions, strict=True):
            write_parquet(out / "predictions" / f"{target.name}.parquet", frame)
        write_csv(out / "history.csv", pd.DataFrame([asdict(epoch) for epoch in fitted.history]))
        about = {"best_epoch": fitted.best_epoch, "epochs": len(fitted.history), "key": key}
        write_json(out / "metrics.json", about)
