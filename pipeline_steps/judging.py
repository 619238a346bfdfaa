"""Candidate and champion on the same holdout rows, to a verdict of the gate."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from pipeline_steps import gate
from pipeline_steps.bootstrap import Holdout, Labels, labels_of
from pipeline_steps.files import read_parquet
from pipeline_steps.gate import Broken, Champion, Measured, Unlike, Verdict
from pipeline_steps.measure import measure
from pipeline_steps.packed import read_images
from pipeline_steps.params import Params, plain_label
from pipeline_steps.progress import say
from pipeline_steps.serving import TRAINED_ON


def verdict(
    params: Params, root: Path, version: str, candidate: Path, champion: str, champion_folder: Path | None
) -> Verdict:
    """Scores both on the holdout rows that neither was trained on, each in a process of its own, and judges.

    A champion that answers other targets than the candidate answers nothing here, and no row counts as seen by it.

    Args:
        params: for the gate's settings and merged labels.
        root: of the workspace that holds data/refit and data/ingest.
        version: of the candidate, for sentences.
        candidate: folder of its MLflow model.
        champion: version of the champion, for sentences.
        champion_folder: of its MLflow model; None where there is no champion.
    """
    tables = {
        target: read_parquet(root / "data" / "refit" / "holdout" / f"{target}.parquet").set_index("sample_id")
        for target in _targets_of(candidate)
    }
    rows = next(iter(tables.values()))[["batch", "group"]].assign(
        **{target: table["label"] for target, table in tables.items()}
    )
    rows = rows.reset_index()
    with tempfile.TemporaryDirectory(prefix="pleat-holdout-") as scratch:
        images = _write_images(rows, root, Path(scratch) / "images")
        return _verdict(params, version, candidate, champion, champion_folder, rows, images)


def _verdict(
    params: Params,
    version: str,
    candidate: Path,
    champion: str,
    champion_folder: Path | None,
    rows: pd.DataFrame,
    images: Sequence[Path],
) -> Verdict:
    targets, models = _targets_of(candidate), [(version, candidate)]
    unmeasured: Champion | None = None
    seen = _trained_on(candidate)
    if champion_folder:
        try:
            answers = _targets_of(champion_folder)
            if answers == targets:
                seen |= _trained_on(champion_folder)
                models.append((champion, champion_folder))
            else:
                unmeasured = Unlike(champion, _words(answers), _words(targets))
        except FileNotFoundError:
            unmeasured = Broken(champion, "it was not made by Pleat, so what it was trained on is not known")
    fair = ~rows["sample_id"].isin(seen)
    if not fair.all():
        say(f"register: {int((~fair).sum()):,} holdout rows do not count: one of the models was trained on them")
    rows, images = rows[fair], [path for path, good in zip(images, fair, strict=True) if good]
    example = candidate / "artifacts" / "package" / "example.jpg"  # where there is no holdout, it must answer this one
    measured = measure(models, images or [example], list(targets))
    if not images:
        none: dict[str, list[Labels]] = {target: [] for target in targets}
        measured = [replace(item, predicted=none) if isinstance(item, Measured) else item for item in measured]
    merged = {plain_label(old): new for old, new in params.labels.merge.items()}  # an older model knows the old names
    renamed = [_renamed(found, merged) for found in measured]
    holdout = Holdout({target: list(map(labels_of, rows[target])) for target in targets}, rows["group"].tolist())
    against = renamed[1] if len(renamed) > 1 else unmeasured
    verdict = gate.judge(params.promotion, holdout, renamed[0], against)
    if len(fair) and not len(rows):
        reason = "One of the models was trained on every row of the holdout, so nothing can be judged on it."
        return replace(verdict, reasons=[reason, *(line for line in verdict.reasons if "holdout is empty" not in line)])
    return verdict


def _renamed(found: Measured | Broken, merged: Mapping[str, str]) -> Measured | Broken:
    if isinstance(found, Broken):
        return found
    predicted = {
        target: [tuple(merged.get(plain_label(label), label) for label in labels) for labels in answers]
        for target, answers in found.predicted.items()
    }
    return replace(found, predicted=predicted)


def _targets_of(folder: Path) -> dict[str, bool]:
    """What an MLflow model of Pleat's answers: its targets, and whether each is multilabel.

    Raises:
        FileNotFoundError: it was not made by Pleat.
    """
    about = json.loads((folder / "artifacts" / "package" / "about.json").read_text(encoding="utf-8"))
    return {target: target in about.get("multilabel", []) for target in about["classes"]}


def _words(targets: Mapping[str, bool]) -> list[str]:
    return [f"{target} (multilabel)" if multilabel else target for target, multilabel in targets.items()]


def _trained_on(folder: Path) -> set[str]:
    """Sample ids that a model learned from, as they travel with it."""
    return set((folder / "artifacts" / "package" / TRAINED_ON).read_text().split())


def _write_images(rows: pd.DataFrame, root: Path, folder: Path) -> list[Path]:
    """The encoded images of the holdout as files, in the order of the rows."""
    folder.mkdir()
    found: dict[str, bytes] = {}
    for batch, part in rows.groupby("batch"):
        found |= read_images(root / "data" / "ingest" / str(batch) / "images.arrow", part["sample_id"].tolist())
    paths = [folder / str(sample_id) for sample_id in rows["sample_id"]]
    for path in paths:
        path.write_bytes(found[path.name])
    return paths
