"""By which key a fold's run in MLflow is found while an earlier evaluation of a model of its name still lies there."""

import shutil
from pathlib import Path

from conftest import load_params
from test_train import OVERRIDES, samples, separable, write_inputs

from pipeline_steps.files import write_json
from pipeline_steps.tracking import Tracker
from pipeline_steps.versions import fold_key


def test_an_earlier_evaluation_names_no_fold_that_is_trained_anew(tmp_path: Path) -> None:
    params, rows = load_params(OVERRIDES), samples()
    write_inputs(tmp_path, rows, separable(rows))
    keys = tmp_path / "reports" / "models" / "frozen" / "keys.json"
    keys.parent.mkdir(parents=True)
    write_json(keys, {"0": "of another training, which had one fold"})
    tracker = Tracker.__new__(Tracker)  # opens no store: that would stay this process's own
    tracker.params, tracker.root = params, tmp_path
    for fold in range(3):
        assert tracker._fold_key("frozen", fold) == fold_key(params, "frozen", fold, tmp_path)

    write_json(keys, {str(fold): f"key {fold}" for fold in range(3)})
    shutil.rmtree(tmp_path / "data" / "prepare")  # as on a worker that only registers
    assert [tracker._fold_key("frozen", fold) for fold in range(3)] == ["key 0", "key 1", "key 2"]
