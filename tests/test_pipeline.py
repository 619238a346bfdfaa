"""The whole pipeline on the sample with the real `dvc repro`."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score
from workspace import check, copy_checkout, environment, lock, run, stages_run, use_quick

MODELS = ["cnn_small", "cnn_tiny"]
FOLDS = [0, 1]
STAGES = {
    "ingest", "validate", "split", "prepare", "train", "evaluate", "profile", "compare", "refit", "compress",
    "register",
}  # fmt: skip
# What does not depend on when or where the pipeline ran (Data Docs hold times).
REPRODUCIBLE = (
    "data/ingest",
    "data/validate",
    "data/split",
    "data/prepare",
    "data/train",
    "data/evaluate",
    "reports/models",
)


def predictions(folder: Path, model: str, fold: int) -> pd.DataFrame:
    return pd.read_parquet(folder / "data" / "train" / model / f"fold_{fold}" / "predictions" / "label.parquet")


def test_every_stage_ran(finished: Path) -> None:
    ran = stages_run((finished / "first_output.txt").read_text())
    assert {name.partition("@")[0] for name in ran} == STAGES
    assert {name for name in ran if name.startswith("train@")} == {f"train@{m}-{k}" for m in MODELS for k in FOLDS}


def test_the_leaderboard_agrees_with_scikit_learn(finished: Path) -> None:
    board = pd.read_csv(finished / "reports" / "leaderboard.csv").set_index("model")
    assert {"f1_weighted", "f1_weighted_std", "f1_macro", "accuracy", "params", "macs"} <= set(board.columns)
    assert set(board.index) == set(MODELS)
    for model in MODELS:
        weighted, exact = [], []
        for fold in FOLDS:
            rows = predictions(finished, model, fold)
            guess = rows.filter(like="p:").idxmax(axis=1).str.removeprefix("p:")
            weighted.append(f1_score(rows["label"], guess, average="weighted"))
            exact.append(accuracy_score(rows["label"], guess))
        scores = pd.Series(weighted)
        assert board.at[model, "f1_weighted"] == pytest.approx(scores.mean(), abs=1e-5)
        assert board.at[model, "f1_weighted_std"] == pytest.approx(scores.std(), abs=1e-5)
        assert board.at[model, "accuracy"] == pytest.approx(pd.Series(exact).mean(), abs=1e-5)


def test_the_first_page_leads_to_every_other(finished: Path) -> None:
    reports = finished / "reports"
    links = set(re.findall(r'href="(?!data:|#)([^"]*)"', (reports / "index.html").read_text()))
    assert {"model_card/index.html", "compression/index.html", "registration/index.html"} <= links
    assert [link for link in links if not (reports / link).is_file()] == []


def test_every_usable_image_outside_the_holdout_is_predicted_once(finished: Path) -> None:
    folds = pd.read_parquet(finished / "data" / "split" / "folds.parquet")
    for model in MODELS:
        predicted = pd.concat([predictions(finished, model, fold) for fold in FOLDS])
        assert sorted(predicted["sample_id"]) == sorted(folds.loc[folds["side"] == "train", "sample_id"])
    assert set(folds["label"]).isdisjoint({"Not sure", "Other", "Skip"})
    assert folds["label"].nunique() == 17


def test_rows_and_files_of_the_sample_are_all_accounted_for(finished: Path) -> None:
    raw = finished / "data" / "raw" / "sample"
    table = pd.read_csv(raw / "images.csv")
    files = {path.stem for path in (raw / "images").iterdir()}
    kept = pd.read_parquet(finished / "data" / "validate" / "manifest.parquet")
    left_out = pd.read_parquet(finished / "data" / "validate" / "quarantine.parquet")
    assert len(kept) + len(left_out) == len(table) + len(files - set(table["image"]))
    counts = json.loads((finished / "data" / "validate" / "counts.json").read_text())
    for label in ("Not sure", "Other", "Skip"):
        assert sum(counts["dropped"][label].values()) == (table["label"] == label).sum()


def test_a_second_repro_runs_nothing(finished: Path) -> None:
    output = check(finished, "dvc", "repro")
    assert stages_run(output) == {"register"}  # which asks whether anything changed outside
    assert "was judged already" in output


def test_another_head_runs_only_its_own_folds(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy", symlinks=True))
    before = lock(folder)
    use_quick(folder, "training.cnn_tiny.max_epochs=5")
    ran = stages_run(check(folder, "dvc", "repro"))
    folds = {f"train@cnn_tiny-{fold}" for fold in FOLDS}
    assert ran == folds | {"evaluate@cnn_tiny", "compare", "refit", "compress", "register"}
    assert lock(folder)["train@cnn_small-0"] == before["train@cnn_small-0"]
    # Back to the first settings: everything comes from DVC's cache.
    use_quick(folder)
    assert stages_run(check(folder, "dvc", "repro")) == {"register"}


def test_metrics_and_leaderboard_are_shown_by_the_tools(finished: Path) -> None:
    shown = json.loads(run(finished, "dvc", "metrics", "show", "--json").stdout)
    files = shown[""]["data"]
    board = pd.read_csv(finished / "reports" / "leaderboard.csv").set_index("model")
    summary = files["data/evaluate/cnn_tiny/metrics.json"]["data"]["f1_weighted"]
    assert summary["mean"] == pytest.approx(board.at["cnn_tiny", "f1_weighted"], abs=1e-5)
    printed = check(finished, "pleat", "leaderboard")
    assert all(model in printed for model in MODELS)


def test_git_stays_clean_but_for_the_lock(finished: Path) -> None:
    status = check(finished, "git", "status", "--porcelain").splitlines()
    assert {line.split()[-1] for line in status} <= {"dvc.lock", "params.yaml", "first_output.txt"}


def interrupted_runs(folder: Path) -> Iterator[str]:
    """Starts `dvc repro` again and again, with Ctrl-C in the next kind of stage each time; yields what was cut off."""
    cut: set[str] = set()
    while cut != STAGES:
        process = subprocess.Popen(
            ["dvc", "repro"], cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("> pleat ") and line.split()[2] not in cut:
                cut.add(line.split()[2])
                os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
                process.stdout.read()
                assert process.wait() != 0
                yield line.split()[2]
                break
        else:
            raise AssertionError(f"dvc repro ended with {process.wait()} before every stage was cut off: {cut}")


def test_ctrl_c_in_every_stage_then_repro_completes_with_the_same_results(finished: Path, tmp_path: Path) -> None:
    folder = copy_checkout(tmp_path / "copy")
    use_quick(folder, "experiment.models=[cnn_tiny]")
    for stage in interrupted_runs(folder):
        done = lock(folder) if (folder / "dvc.lock").exists() else {}
        assert not any(name.partition("@")[0] == stage for name in done), f"{stage} was cut off, yet counts as finished"
        assert not list(folder.glob("data/**/.partial-*"))
    check(folder, "dvc", "repro")
    undisturbed = lock(finished)
    for name, stage in lock(folder).items():
        for out in stage["outs"]:
            if out["path"].startswith(REPRODUCIBLE):
                assert out in undisturbed[name]["outs"], (name, out["path"])
