"""Whether a delivery may become a batch: read and validated as by the pipeline, compared with the training data."""

import difflib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from pipeline_steps import drift, ingest, workspaces
from pipeline_steps.drift import Distance
from pipeline_steps.errors import PleatError
from pipeline_steps.expectations import Outcome, Rule, read_suite, run_suite
from pipeline_steps.files import read_parquet
from pipeline_steps.image_statistics import STATISTICS, sample, statistics
from pipeline_steps.params import Drift, Params
from pipeline_steps.validate import SUITE, apply_labels, remove_copies

UNUSABLE = ("missing file", "undecodable", "truncated", "too small", "too many pixels", "outside the folder")
MAX_UNUSABLE = 0.2  # of a delivery's labelled images; more of them speak for a transfer that went wrong
NO_TRAINING_DATA = (
    "It was not compared with the training data: no batch of the experiment is ingested here, since the pipeline has "
    "not run yet."
)


@dataclass
class Check:
    """What was found out about a delivery; each reason speaks against it, a note is only told.

    Attributes:
        reasons: sentences; where there is none the delivery is good.
        notes: sentences.
        manifest: its usable images, labels dropped and merged.
        quarantine: reason to number of rows or files.
        outcomes: of the expectations.
        labels: a row for each label: its number of `training` and `delivery` images.
        distances: from the training data.
        training: image statistics of a sample of the training data, a row an image.
        delivery: likewise.
    """

    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    manifest: pd.DataFrame = field(default_factory=pd.DataFrame)
    quarantine: dict[str, int] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    labels: pd.DataFrame = field(default_factory=pd.DataFrame)
    distances: list[Distance] = field(default_factory=list)
    training: pd.DataFrame = field(default_factory=pd.DataFrame)
    delivery: pd.DataFrame = field(default_factory=pd.DataFrame)


def check(params: Params, root: Path, work: Path, batch: str, kept: Path) -> Check:
    """Ingests data/raw/BATCH of the folder `work` and looks at it from all sides.

    Args:
        params: of the project.
        root: the project's folder, for the suite and the training data.
        work: a folder with the delivery as data/raw/BATCH; data/ingest/BATCH is written in it.
        batch: the delivery's name.
        kept: where the statistics of training images are kept between calls.

    Raises:
        PleatError: a place cannot be written or the disk is full, or the suite of the project cannot be read.
    """
    found = Check()
    alone = params.experiment.model_copy(update={"batches": [batch]})
    try:
        ingest.run(params.model_copy(update={"experiment": alone}), batch, work)
    except PleatError as error:
        if error.temporary:
            raise
        found.reasons.append(str(error))
        return found
    own = _read([work / "data" / "ingest" / batch])
    found.manifest, left_out = _clean(own, params)
    found.quarantine = dict(Counter(left_out["reason"]))
    _check_usable(found, len(own[0]) + len(own[1]) - sum(own[1]["reason"] == "no label"))
    folders = {name: folder for name in params.experiment.batches if (folder := _ingested(root, name))}
    training, _ = _clean(_read(list(folders.values())), params) if folders else (pd.DataFrame(), None)
    absent = [name for name in params.experiment.batches if name not in folders]
    if absent and not training.empty:
        found.notes.append(f"It was compared without {', '.join(absent)}: no run has ingested that yet.")
    _check_suite(found, root, work, training, params, [*folders.values(), work / "data" / "ingest" / batch])
    if training.empty:
        found.notes.append(NO_TRAINING_DATA)
        found.labels = _label_table({}, Counter(found.manifest["label"]))
    elif not found.manifest.empty:
        _compare(found, training, params.inbox.max_drift, folders, work / "data" / "ingest" / batch, kept)
    return found


def _ingested(root: Path, batch: str) -> Path | None:
    """The folder in which a batch is ingested: the project's own, else that of the newest run of Airflow's."""
    runs = list(workspaces.folder_of(root).glob(f"[!.]*/data/ingest/{batch}"))
    for folder in [
        root / "data" / "ingest" / batch,
        *sorted(runs, key=lambda path: path.stat().st_mtime, reverse=True),
    ]:
        if (folder / "manifest.parquet").is_file() and (folder / "images.arrow").is_file():
            return folder
    return None


def _read(folders: list[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Manifest and quarantine of ingested batches."""
    names = ("manifest.parquet", "quarantine.parquet")
    frames = [pd.concat([read_parquet(folder / name) for folder in folders], ignore_index=True) for name in names]
    return frames[0], frames[1]


def _clean(ingested: tuple[pd.DataFrame, pd.DataFrame], params: Params) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Manifest and quarantine as `validate` leaves them."""
    manifest, dropped, _ = apply_labels(*ingested, params.labels)
    manifest, copies = remove_copies(manifest)
    return manifest, pd.concat([ingested[1], dropped, copies], ignore_index=True)


def _check_usable(found: Check, n_rows: int) -> None:
    n_unusable = sum(found.quarantine.get(reason, 0) for reason in UNUSABLE)
    if found.manifest.empty:
        counts = ", ".join(f"{n:,} {reason}" for reason, n in sorted(found.quarantine.items()))
        found.reasons.append(f"Not one image is left to train on: {counts}.")
    elif n_unusable > MAX_UNUSABLE * n_rows:
        counts = ", ".join(
            f"{found.quarantine[reason]:,} {reason}" for reason in UNUSABLE if reason in found.quarantine
        )
        found.reasons.append(
            f"{n_unusable:,} of {n_rows:,} labelled images cannot be used ({counts}), more than a fifth; the transfer "
            "may have been cut short."
        )


def _check_suite(
    found: Check, root: Path, work: Path, training: pd.DataFrame, params: Params, folders: list[Path]
) -> None:
    """Rules on rows look at the delivery alone; rules on the whole table at what `validate` would see with it."""
    if found.manifest.empty:
        return
    rules = read_suite(root / SUITE)
    on_rows = [rule for rule in rules if _on_rows(rule)]
    on_table = [rule for rule in rules if rule not in on_rows]
    found.outcomes += _outcomes(found.manifest, on_rows, work / "docs_rows")
    if on_table and not training.empty:
        together, _ = _clean(_read(folders), params)
        found.outcomes += _outcomes(together, on_table, work / "docs_table")
    for outcome in found.outcomes:
        if not outcome.success:
            (found.reasons if outcome.rule.severity == "critical" else found.notes).append(outcome.sentence())


def _outcomes(manifest: pd.DataFrame, rules: list[Rule], docs: Path) -> list[Outcome]:
    if not rules:
        return []
    return run_suite(manifest.assign(aspect_ratio=manifest["width"] / manifest["height"]), rules, docs)


def _on_rows(rule: Rule) -> bool:
    """Whether an expectation judges each row by itself; an unknown one is refused when it is run."""
    from great_expectations.expectations import registry
    from great_expectations.expectations.expectation import (
        ColumnMapExpectation,
        ColumnPairMapExpectation,
        MulticolumnMapExpectation,
    )

    if rule.expect not in registry.list_registered_expectation_implementations():
        return True
    kinds = (ColumnMapExpectation, ColumnPairMapExpectation, MulticolumnMapExpectation)
    return issubclass(registry.get_expectation_impl(rule.expect), kinds)


def _compare(
    found: Check, training: pd.DataFrame, limits: Drift, folders: dict[str, Path], own: Path, kept: Path
) -> None:
    known, delivered = Counter(training["label"]), Counter(found.manifest["label"])
    found.labels = _label_table(known, delivered)
    unknown = sorted(set(delivered) - set(known))
    if unknown:
        names = ", ".join(f"'{label}' ({delivered[label]:,} images{_nearest(label, known)})" for label in unknown)
        allowed = limits.new_labels
        advice = "" if allowed else " Merge or drop them under `labels`, or allow them with inbox.max_drift.new_labels."
        (found.notes if allowed else found.reasons).append(
            f"Labels that the training data does not have: {names}.{advice}"
        )
    before, now = sample(training), sample(found.manifest)
    found.training = statistics(before, {name: folder / "images.arrow" for name, folder in folders.items()}, kept)
    found.delivery = statistics(now, {own.name: own / "images.arrow"})
    found.distances = [drift.label_distance(known, delivered, limits.label_shares)]
    found.distances += [
        drift.statistic_distance(
            name, found.training[name].to_numpy(), found.delivery[name].to_numpy(), limits.image_statistics
        )
        for name in STATISTICS
    ]
    found.reasons += [_sentence(distance) for distance in found.distances if distance.broken]


def _nearest(label: str, known: Counter[str]) -> str:
    near = difflib.get_close_matches(label, known, n=1)
    return f", nearest is '{near[0]}'" if near else ""


def _label_table(training: dict[str, int], delivery: dict[str, int]) -> pd.DataFrame:
    names = sorted({*training, *delivery}, key=lambda name: (-training.get(name, 0), -delivery.get(name, 0), name))
    counts = {"training": training, "delivery": delivery}
    return pd.DataFrame(
        {side: [n.get(name, 0) for name in names] for side, n in counts.items()}, index=names, dtype=int
    )


def _sentence(distance: Distance) -> str:
    apart = f"by {distance.distance:.2f} from those of the training data (limit {distance.limit:g})"
    if distance.name == drift.LABEL_SHARES:
        return f"The label shares differ {apart}."
    return (
        f"The values of {distance.name.replace('_', ' ')} ({STATISTICS[distance.name]}) differ {apart}: their mean is "
        f"{distance.delivery:.3g}, that of the training data {distance.training:.3g}."
    )
