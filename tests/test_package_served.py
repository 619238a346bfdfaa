"""MLflow's own commands answer real photos with a package: `mlflow models serve` and `mlflow models predict`."""

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import requests
from refit_workspace import encoded_images, holdout, probabilities
from workspace import check, environment

from pipeline_steps.registry import Registry

CLASSES = ["Dress", "Pants", "Shoes"]


@pytest.fixture(scope="module")
def saved(refitted_on_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The MLflow model of the package, as `register` makes it."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        return Registry("model").save(refitted_on_photos / "data" / "refit" / "package", folder / "model")


@pytest.fixture(scope="module")
def photos(refitted_on_photos: Path) -> tuple[list[bytes], np.ndarray]:
    """Photos of the holdout, and the probabilities that the pipeline itself gave them."""
    rows = holdout(refitted_on_photos)
    return encoded_images(refitted_on_photos, rows["sample_id"]), probabilities(rows)


@contextlib.contextmanager
def served(model: Path, folder: Path) -> Iterator[str]:
    """`mlflow models serve` on a free port of the loopback interface."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = ["mlflow", "models", "serve", "--model-uri", str(model), "--env-manager", "local", "--host", "127.0.0.1"]
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--workers", "1"], cwd=folder, env=environment(), stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"http://127.0.0.1:{port}/ping", timeout=10).ok:
                    break
            assert server.poll() is None, (folder / "log.txt").read_text()
            assert time.monotonic() < deadline, (folder / "log.txt").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


def strict_json(text: str) -> Any:
    """Without NaN, which Python would read but no browser."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def check_answer(row: dict[str, Any], expected: np.ndarray) -> None:
    assert row["error"] is None
    found = {entry["label"]: entry["probability"] for entry in row["label_top_k"]}
    np.testing.assert_allclose([found[name] for name in CLASSES], expected, atol=1e-4)
    assert (row["label"], row["label_probability"]) == (CLASSES[expected.argmax()], max(found.values()))


def test_serve_answers_photos_over_rest(saved: Path, photos: tuple[list[bytes], np.ndarray], tmp_path: Path) -> None:
    images, expected = photos
    texts = [base64.b64encode(image).decode() for image in images]
    path = tmp_path / "photo.jpg"
    path.write_bytes(images[1])
    with served(saved, tmp_path) as address:

        def ask(**body: Any) -> list[dict[str, Any]]:
            answer = requests.post(f"{address}/invocations", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            return list(strict_json(answer.text)["predictions"])

        def frame(*cells: Any) -> dict[str, Any]:
            return {"columns": ["image"], "data": [[cell] for cell in cells]}

        rows = ask(dataframe_split=frame(*texts))
        assert len(rows) == len(images) == 15
        for row, probability in zip(rows, expected, strict=True):
            check_answer(row, probability)
        pixels = np.zeros((20, 30, 3), dtype=int).tolist()
        mixed = ask(dataframe_split=frame(texts[0], "no photo at all", pixels, str(path), None), params={"top_k": 1})
        assert [row["error"] for row in mixed] == [
            None, "the file cannot be read: No such file or directory", None, None,
            "expected bytes, base64, a path or an array of pixels, but got NoneType",
        ]  # fmt: skip
        for row, probability in ((mixed[0], expected[0]), (mixed[3], expected[1])):
            assert row["label_top_k"] == [{"label": row["label"], "probability": row["label_probability"]}]
            assert row["label"] == CLASSES[probability.argmax()]
            assert row["label_probability"] == pytest.approx(probability.max(), abs=1e-4)
        assert mixed[1]["label"] is mixed[1]["label_probability"] is mixed[1]["label_top_k"] is None
        check_answer(ask(dataframe_records=[{"image": texts[2]}])[0], expected[2])
        wrong = {"dataframe_split": {"columns": ["picture"], "data": [[texts[0]]]}}
        refused = requests.post(f"{address}/invocations", json=wrong, timeout=60)
        assert refused.status_code == 400
        assert "image" in refused.text


def test_predict_answers_photos_of_a_folder(
    saved: Path, photos: tuple[list[bytes], np.ndarray], tmp_path: Path
) -> None:
    images, expected = photos
    paths = [tmp_path / f"photo {number}.jpg" for number in range(3)]
    for path, image in zip(paths, images, strict=False):
        path.write_bytes(image)
    question, answer = tmp_path / "question.json", tmp_path / "answer.json"
    frame = pd.DataFrame({"image": [*map(str, paths), str(tmp_path / "absent.jpg")]})
    question.write_text(json.dumps({"dataframe_split": frame.to_dict(orient="split")}))
    check(
        tmp_path, "mlflow", "models", "predict", "--model-uri", str(saved), "--env-manager", "local",
        "--input-path", str(question), "--content-type", "json", "--output-path", str(answer),
    )  # fmt: skip
    *rows, absent = strict_json(answer.read_text())["predictions"]
    for row, probability in zip(rows, expected[:3], strict=True):
        check_answer(row, probability)
    assert absent["error"] == "the file cannot be read: No such file or directory"
