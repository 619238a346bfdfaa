"""Stage `validate`: labels dropped and merged, copies removed, the manifest checked by Great Expectations."""

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline_steps.data_docs import write_pages
from pipeline_steps.errors import PleatError
from pipeline_steps.expectations import read_suite, run_suite
from pipeline_steps.files import atomic_folder, read_parquet, write_json, write_parquet
from pipeline_steps.ingest import QUARANTINE_COLUMNS
from pipeline_steps.params import Labels, Params, plain_label
from pipeline_steps.progress import say

SUITE = Path("data/expectations/manifest.yaml")


def run(params: Params, root: Path = Path()) -> None:
    """Writes data/validate (manifest, quarantine, counts) and reports/validation (Data Docs).

    Raises:
        PleatError: a critical expectation failed; the message names it, the rows and what to do.
    """
    folders = [root / "data" / "ingest" / batch for batch in params.experiment.batches]
    manifest = pd.concat([read_parquet(folder / "manifest.parquet") for folder in folders], ignore_index=True)
    quarantine = pd.concat([read_parquet(folder / "quarantine.parquet") for folder in folders], ignore_index=True)

    manifest, dropped, counts = apply_labels(manifest, quarantine, params.labels)
    manifest, copies = remove_copies(manifest)
    quarantine = pd.concat([quarantine, dropped, copies], ignore_index=True)
    counts["labels"] = dict(Counter(manifest["label"]))
    counts["quarantine"] = dict(Counter(quarantine["reason"]))
    counts["samples"] = len(manifest)

    rules = read_suite(root / SUITE)
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


def apply_labels(
    manifest: pd.DataFrame, quarantine: pd.DataFrame, labels: Labels
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Drops and merges labels; case and outer space do not matter.

    Args:
        manifest: the readable samples of all batches.
        quarantine: what ingestion left out; its labels are counted, not moved.
        labels: the `labels` block of params.yaml.

    Returns:
        The manifest that stays, the quarantine rows of the dropped samples, and counts: under `dropped`, for each
        label of the drop list, how many samples had it and how many rows without a usable image had it.
    """
    spelled = manifest["label"].str.strip()
    drop = {plain_label(label): label for label in labels.drop}
    merge = {plain_label(old): new for old, new in labels.merge.items()}
    plain = spelled.map(plain_label)
    without_image = Counter(quarantine["label"].map(plain_label))
    with_image = Counter(plain)
    counts = {
        "dropped": {
            label: {"samples": with_image[key], "rows_without_image": without_image[key]} for key, label in drop.items()
        },
        "drop_matched_nothing": [label for key, label in drop.items() if not with_image[key] + without_image[key]],
        "merged": {old: with_image[plain_label(old)] for old in labels.merge},
    }
    gone = plain.isin(drop)
    dropped = manifest[gone].assign(reason="dropped label", detail="its label is in labels.drop")
    renamed = manifest.assign(label=[merge.get(key, label) for key, label in zip(plain, spelled, strict=True)])
    return renamed[~gone].reset_index(drop=True), dropped[QUARANTINE_COLUMNS], counts


def remove_copies(manifest: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Keeps one row of each set of byte-identical images, and none where their labels contradict each other.

    Returns:
        The manifest with unique sample_id, and the quarantine rows of what was removed.
    """
    labels = manifest.groupby("sample_id")["label"].transform("nunique")
    conflicting = labels > 1
    repeated = manifest.duplicated("sample_id") & ~conflicting
    first = manifest.drop_duplicates("sample_id").set_index("sample_id")["source_path"]
    others = manifest.groupby("sample_id")["label"].agg(lambda group: " / ".join(sorted(set(group))))
    copies = pd.concat(
        [
            manifest[repeated].assign(
                reason="duplicate", detail=lambda rows: "same bytes as " + rows["sample_id"].map(first)
            ),
            manifest[conflicting].assign(
                reason="conflicting labels", detail=lambda rows: "same bytes as " + rows["sample_id"].map(others)
            ),
        ]
    )
    return manifest[~(conflicting | repeated)].reset_index(drop=True), copies[QUARANTINE_COLUMNS]


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
    say(f"validate: {counts['samples']:,} samples of {len(counts['labels'])} classes; quarantine: {left_out}")
    say(f"validate: {passed} of {rules} expectations hold; Data Docs in reports/validation/index.html")
