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
from pipeline_steps.image_statistics import STATISTICS, sample, statistics
from pipeline_steps.params import Drift, Params
from pipeline_steps.targets import label_columns
from pipeline_steps.validate import SUITE, apply_labels, keep_classes, read_ingested, remove_copies, top_classes

UNUSABLE = ("missing file", "undecodable", "truncated", "too small", "too many pixels", "outside the folder")
MAX_UNUSABLE = 0.2  # of a delivery's labelled images; more of them speak for a transfer that went wrong
NO_TRAINING_DATA = (
    "It was not compared with the training data: no batch of the experiment is ingested here, since the pipeline has "
    "not run yet."
)


# Manifest and quarantine.
Ingested = tuple[pd.DataFrame, pd.DataFrame]


@dataclass
class Check:
    """What was found out about a delivery; each reason speaks against it, a note is only told.

    Attributes:
        reasons: sentences; where there is none the delivery is good.
        notes: sentences.
        manifest: its usable images, labels dropped and merged, of the top classes.
        quarantine: reason to number of rows or files.
        outcomes: of the expectations.
        labels: by label column, a row for each label: its number of `training` and `delivery` images.
        distances: from the training data.
        training: image statistics of a sample of the training data, a row an image.
        delivery: likewise.
    """

    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    manifest: pd.DataFrame = field(default_factory=pd.DataFrame)
    quarantine: dict[str, int] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    labels: dict[str, pd.DataFrame] = field(default_factory=dict)
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
    columns, ingested = label_columns(params.targets), work / "data" / "ingest" / batch
    folders = {name: folder for name in params.experiment.batches if (folder := _ingested(root, name))}
    before = read_ingested(folders, params.targets) if folders else None
    try:
        own = read_ingested({batch: ingested}, params.targets)
    except PleatError as error:
        found.reasons.append(str(error))
        return found
    together, _ = _clean(_joined(before, own) if before else own, params)
    # As `validate` would choose them with the delivery.
    classes = top_classes(together, params.labels, columns)
    training, _ = keep_classes(_clean(before, params)[0], classes) if before else (pd.DataFrame(), None)
    usable, left_out = _clean(own, params)
    found.manifest, rare = keep_classes(usable, classes)
    found.quarantine = dict(Counter([*left_out["reason"], *rare["reason"]]))
    _check_usable(found, len(own[0]) + len(own[1]) - sum(own[1]["reason"] == "no label"))
    absent = [name for name in params.experiment.batches if name not in folders]
    if absent and not training.empty:
        found.notes.append(f"It was compared without {', '.join(absent)}: no run has ingested that yet.")
    rules = read_suite(root / SUITE, columns)
    _check_suite(found, rules, None if training.empty else keep_classes(together, classes)[0], work)
    if training.empty:
        found.notes.append(NO_TRAINING_DATA)
        found.labels = {column: _label_table({}, Counter(found.manifest[column])) for column in columns}
    elif not found.manifest.empty:
        for column in columns:
            _compare_labels(found, column, training, params.inbox.max_drift, f" of {column}" if columns[1:] else "")
        _compare_statistics(found, training, params.inbox.max_drift, folders, ingested, kept)
        found.reasons += [_sentence(distance) for distance in found.distances if distance.broken]
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


def _clean(ingested: Ingested, params: Params) -> Ingested:
    """Manifest and quarantine as `validate` leaves them, but with all classes."""
    columns = label_columns(params.targets)
    manifest, dropped, _ = apply_labels(*ingested, params.labels, columns)
    manifest, copies = remove_copies(manifest, columns)
    return manifest, pd.concat([ingested[1], dropped, copies], ignore_index=True)


def _joined(first: Ingested, second: Ingested) -> Ingested:
    manifests, quarantines = zip(first, second, strict=True)
    return pd.concat(manifests, ignore_index=True), pd.concat(quarantines, ignore_index=True)


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


def _check_suite(found: Check, rules: list[Rule], together: pd.DataFrame | None, work: Path) -> None:
    """Rules on rows look at the delivery alone; rules on the whole table at what `validate` would see with it."""
    if found.manifest.empty:
        return
    on_rows = [rule for rule in rules if _on_rows(rule)]
    found.outcomes += _outcomes(found.manifest, on_rows, work / "docs_rows")
    if together is not None:
        found.outcomes += _outcomes(together, [rule for rule in rules if rule not in on_rows], work / "docs_table")
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


def _compare_labels(found: Check, column: str, training: pd.DataFrame, limits: Drift, of_column: str) -> None:
    """`of_column` tells in sentences which label column is meant; empty where there is only one."""
    known, delivered = Counter(training[column]), Counter(found.manifest[column])
    found.labels[column] = _label_table(known, delivered)
    unknown = sorted(set(delivered) - set(known))
    if unknown:
        names = ", ".join(f"'{label}' ({delivered[label]:,} images{_nearest(label, known)})" for label in unknown)
        allowed = limits.new_labels
        advice = "" if allowed else " Merge or drop them under `labels`, or allow them with inbox.max_drift.new_labels."
        (found.notes if allowed else found.reasons).append(
            f"Labels{of_column} that the training data does not have: {names}.{advice}"
        )
    name = f"{drift.LABEL_SHARES}{of_column}"
    found.distances.append(drift.label_distance(known, delivered, limits.label_shares, name))


def _compare_statistics(
    found: Check, training: pd.DataFrame, limits: Drift, folders: dict[str, Path], own: Path, kept: Path
) -> None:
    before, now = sample(training), sample(found.manifest)
    found.training = statistics(before, {name: folder / "images.arrow" for name, folder in folders.items()}, kept)
    found.delivery = statistics(now, {own.name: own / "images.arrow"})
    found.distances += [
        drift.statistic_distance(
            name, found.training[name].to_numpy(), found.delivery[name].to_numpy(), limits.image_statistics
        )
        for name in STATISTICS
    ]


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
    if distance.name not in STATISTICS:
        return f"The {distance.name} differ {apart}."
    return (
        f"The values of {distance.name.replace('_', ' ')} ({STATISTICS[distance.name]}) differ {apart}: their mean is "
        f"{distance.delivery:.3g}, that of the training data {distance.training:.3g}."
    )
