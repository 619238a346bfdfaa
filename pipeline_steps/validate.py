"""Stage `validate`: labels dropped and merged, copies removed, the manifest checked by Great Expectations."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline_steps import params as settings
from pipeline_steps.data_docs import classes_in_words, write_pages
from pipeline_steps.errors import PleatError
from pipeline_steps.expectations import read_suite, run_suite
from pipeline_steps.files import atomic_folder, read_parquet, write_json, write_parquet
from pipeline_steps.ingest import QUARANTINE_COLUMNS
from pipeline_steps.params import Labels, Params, plain_label
from pipeline_steps.progress import say
from pipeline_steps.targets import label_columns

SUITE = Path("data/expectations/manifest.yaml")
BETWEEN_LABELS = " / "  # in the quarantine, which has one column for the labels of all


def run(params: Params, root: Path = Path()) -> None:
    """Writes data/validate (manifest, quarantine, counts) and reports/validation (Data Docs).

    Raises:
        PleatError: a batch lacks a target's label column, or a critical expectation failed; the message names the rows
            and what to do.
    """
    columns = label_columns(params.targets)
    folders = {batch: root / "data" / "ingest" / batch for batch in params.experiment.batches}
    manifest, quarantine = read_ingested(folders, params.targets)

    manifest, dropped, counts = apply_labels(manifest, quarantine, params.labels, columns)
    manifest, copies = remove_copies(manifest, columns)
    manifest, rare = keep_classes(manifest, top_classes(manifest, params.labels, columns))
    quarantine = pd.concat([quarantine, dropped, copies, rare], ignore_index=True)
    counts["labels"] = {column: dict(Counter(manifest[column])) for column in columns}
    counts["quarantine"] = dict(Counter(quarantine["reason"]))
    counts["samples"] = len(manifest)

    rules = read_suite(root / SUITE, columns)
    # The pages stay when an expectation fails, since then they are wanted most; DVC takes them only on success.
    with atomic_folder(root / "reports" / "validation") as docs:
        outcomes = run_suite(manifest.assign(aspect_ratio=manifest["width"] / manifest["height"]), rules, docs)
        write_pages(docs, outcomes, counts, quarantine)
    failed = [outcome for outcome in outcomes if not outcome.success]
    counts["warnings"] = [outcome.sentence() for outcome in failed if outcome.rule.severity == "warning"]
    _report(counts, len(rules) - len(failed), len(rules))
    critical = [outcome.sentence() for outcome in failed if outcome.rule.severity == "critical"]
    if critical:
        raise PleatError(" ".join([*critical, "All results: reports/validation/index.html."]))
    with atomic_folder(root / "data" / "validate") as out:
        write_json(out / "counts.json", counts)
        write_parquet(out / "manifest.parquet", manifest)
        write_parquet(out / "quarantine.parquet", quarantine)


def read_ingested(
    folders: Mapping[str, Path], targets: Mapping[str, settings.Target]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Manifest and quarantine of ingested batches, without the label columns that no target is read from.

    Args:
        folders: each batch and the folder that `ingest` wrote for it.
        targets: the block of params.yaml.

    Raises:
        PleatError: a batch lacks a label column of a target, or is not ingested.
    """
    manifests, quarantines = [], []
    for batch, folder in folders.items():
        manifest = read_parquet(folder / "manifest.parquet")
        there = [name for name in manifest.columns if name not in settings.TAKEN]
        _check_columns(batch, there, targets)
        unused = [name for name in there if name not in label_columns(targets)]
        manifests.append(manifest.drop(columns=unused))
        left_out = read_parquet(folder / "quarantine.parquet")
        quarantines.append(left_out.assign(label=[_labels_but(unused, there, joined) for joined in left_out["label"]]))
    return pd.concat(manifests, ignore_index=True), pd.concat(quarantines, ignore_index=True)


def apply_labels(
    manifest: pd.DataFrame, quarantine: pd.DataFrame, labels: Labels, columns: list[str]
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Drops and merges labels; case and outer space do not matter.

    Args:
        manifest: the readable samples of all batches.
        quarantine: what ingestion left out; its labels are counted, not moved.
        labels: the `labels` block of params.yaml.
        columns: the label columns; a sample with a dropped label in any of them is dropped.

    Returns:
        The manifest that stays, the quarantine rows of the dropped samples, and counts: under `dropped`, for each
        label of the drop list, how many samples had it and how many rows without a usable image had it.
    """
    spelled = manifest[columns].apply(lambda column: column.str.strip())
    drop = {plain_label(label): label for label in labels.drop}
    merge = {plain_label(old): new for old, new in labels.merge.items()}
    plain = spelled.map(plain_label)
    refused = (joined.split(BETWEEN_LABELS) if len(columns) > 1 else [joined] for joined in quarantine["label"])
    without_image = Counter(label for row in refused for label in set(map(plain_label, row)))
    with_image = Counter(label for row in plain.to_numpy() for label in set(row))
    counts = {
        "dropped": {
            label: {"samples": with_image[key], "rows_without_image": without_image[key]} for key, label in drop.items()
        },
        "drop_matched_nothing": [label for key, label in drop.items() if not with_image[key] + without_image[key]],
        "merged": {old: with_image[plain_label(old)] for old in labels.merge},
    }
    gone = plain.isin(drop.keys()).any(axis=1)
    dropped = _quarantined(manifest[gone], columns, "dropped label", "its label is in labels.drop")
    renamed = {
        column: [merge.get(key, label) for key, label in zip(plain[column], spelled[column], strict=True)]
        for column in columns
    }
    return manifest.assign(**renamed)[~gone].reset_index(drop=True), dropped, counts


def remove_copies(manifest: pd.DataFrame, columns: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Keeps one row of each set of byte-identical images, and none where their labels contradict each other.

    Args:
        manifest: samples with their labels in `columns`.
        columns: the label columns; copies contradict each other where they differ in any of them.

    Returns:
        The manifest with unique sample_id, and the quarantine rows of what was removed.
    """
    differ = manifest.groupby("sample_id")[columns].transform("nunique") > 1
    conflicting = differ.any(axis=1)
    repeated = manifest.duplicated("sample_id") & ~conflicting
    first = manifest.drop_duplicates("sample_id").set_index("sample_id")["source_path"]
    others = {
        sample: ", ".join(" / ".join(sorted(set(rows[name]))) for name in columns if rows[name].nunique() > 1)
        for sample, rows in manifest[conflicting].groupby("sample_id")
    }
    copies = [
        _quarantined(rows, columns, reason, "same bytes as " + rows["sample_id"].map(same))
        for reason, rows, same in (
            ("duplicate", manifest[repeated], first),
            ("conflicting labels", manifest[conflicting], others),
        )
    ]
    return manifest[~(conflicting | repeated)].reset_index(drop=True), pd.concat(copies)


def top_classes(manifest: pd.DataFrame, labels: Labels, columns: list[str]) -> dict[str, list[str]]:
    """The `labels.top_classes` most frequent classes of each label column, of equals the first by name; null: all.

    Args:
        manifest: samples of all batches, labels dropped and merged, without copies.
        labels: the `labels` block of params.yaml.
        columns: the label columns.
    """
    found = {}
    for column in columns:
        by_name = manifest[column].value_counts().sort_index()
        found[column] = list(by_name.sort_values(ascending=False, kind="stable").index[: labels.top_classes])
    return found


def keep_classes(manifest: pd.DataFrame, classes: Mapping[str, list[str]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Keeps the samples whose label is among `classes` in every label column.

    Returns:
        The manifest that stays, and the quarantine rows of the others.
    """
    kept = manifest[list(classes)].isin(classes).all(axis=1)
    detail = "its class is not among the most frequent ones that labels.top_classes keeps"
    rare = _quarantined(manifest[~kept], list(classes), "not a top class", detail)
    return manifest[kept].reset_index(drop=True), rare


def _check_columns(batch: str, there: list[str], targets: Mapping[str, settings.Target]) -> None:
    for name, target in targets.items():
        for column in target.columns(name):
            if column not in there:
                raise PleatError(
                    f"Target {name} is read from the label column {column}, but the batch {batch} has "
                    f"{', '.join(there) or 'none'}; correct `targets` in params.yaml, or take the batch off "
                    "experiment.batches."
                )


def _labels_but(unused: list[str], there: list[str], joined: str) -> str:
    """The joined labels of a quarantine row without those of the unused columns; left alone where they do not fit."""
    labels = joined.split(BETWEEN_LABELS)
    if not unused or len(labels) != len(there):
        return joined
    return BETWEEN_LABELS.join(label for label, column in zip(labels, there, strict=True) if column not in unused)


def _quarantined(rows: pd.DataFrame, columns: list[str], reason: str, detail: "str | pd.Series[str]") -> pd.DataFrame:
    joined = [BETWEEN_LABELS.join(labels) for labels in rows[columns].to_numpy()]
    return rows.assign(label=joined, reason=reason, detail=detail)[QUARANTINE_COLUMNS]


def _report(counts: dict[str, Any], passed: int, rules: int) -> None:
    for label, n in counts["dropped"].items():
        if n["samples"] or n["rows_without_image"]:
            say(
                f"validate: dropped '{label}': {n['samples']:,} samples, {n['rows_without_image']:,} rows without image"
            )
    for label in counts["drop_matched_nothing"]:
        say(f"validate: labels.drop names '{label}', but no row has that label")
    for old, n in counts["merged"].items():
        say(f"validate: merged '{old}': {n:,} samples")
    for warning in counts["warnings"]:
        say(f"validate: warning: {warning}")
    left_out = ", ".join(f"{n:,} {reason}" for reason, n in sorted(counts["quarantine"].items())) or "empty"
    say(f"validate: {counts['samples']:,} samples of {classes_in_words(counts['labels'])}; quarantine: {left_out}")
    say(f"validate: {passed} of {rules} expectations hold; Data Docs in reports/validation/index.html")
