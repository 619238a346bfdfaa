"""A model in a process of its own: what it can import and see, how it may fail, how it ends, what it is measured at."""

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import psutil
import pytest
from refit_workspace import CLASSES, encoded_images, holdout, probabilities

from pipeline_steps.gate import Broken, Measured
from pipeline_steps.isolated import BrokenError, Isolated, link_requirements, requirements_of, start
from pipeline_steps.measure import measure
from pipeline_steps.registry import Registry

REQUIRED = ["mlflow", "pandas"]
# Does what the name of each "image" says.
PROBE = """
import importlib, json, os, sys, time
from pathlib import Path
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

class Probe(PythonModel):
    def load_context(self, context):
        self.ballast = bytearray(os.urandom(1)) * MEGABYTES * 2**20

    def predict(self, context, model_input, params=None):
        return pd.DataFrame([self.row(*Path(path).name.split(":")) for path in model_input["image"]])

    def row(self, do, what=""):
        label = error = None
        if do == "import":
            try:
                importlib.import_module(what)
                label = "imported"
            except ImportError as reason:
                error = str(reason)
        elif do == "environment":
            label = json.dumps(dict(os.environ))
        elif do == "path":
            label = json.dumps(sys.path)
        elif do == "sleep":
            time.sleep(float(what))
            label = "slept"
        elif do == "print":
            print("mixed in")
            os.write(1, b'{"rows": []}\\n')
            sys.__stdout__.write("and this")
            sys.__stdout__.flush()
            label = "printed"
        elif do == "raise":
            raise ValueError("the model is\\nconfused")
        elif do == "exit":
            print("these are its last words", file=sys.stderr, flush=True)
            os._exit(int(what))
        return {"label": label, "error": error}

set_model(Probe())
"""


def save(folder: Path, code: str = PROBE, requirements: list[str] = REQUIRED) -> Path:
    """An MLflow model of this code."""
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(code.replace("MEGABYTES", "1"))
    mlflow.pyfunc.save_model(
        str(folder / "saved"), python_model=str(folder / "model.py"), pip_requirements=requirements
    )
    return folder / "saved"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("probe") / "model")


@pytest.fixture(scope="module")
def probe(saved: Path) -> Iterator[Isolated]:
    """A running model, with things in the environment of its parent that are none of its business."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "DATABASE_URL"):
            patch.setenv(name, "hunter2")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        with start(REQUIRED) as model:
            model.load(saved)
            yield model


def imported(model: Isolated, *names: str) -> dict[str, bool]:
    rows = model.answers([Path(f"import:{name}") for name in names])
    return {name: row["label"] == "imported" for name, row in zip(names, rows, strict=True)}


def test_only_what_is_stated_and_what_that_requires_can_be_imported(probe: Isolated) -> None:
    unstated = ("pipeline_steps", "timm", "torch", "dvc", "airflow", "onnxruntime", "safetensors", "pytest", "ruamel")
    for name in unstated:
        importlib.import_module(name)  # it is here, so that the child could have found it
    needed = ("mlflow", "pandas", "numpy", "yaml", "sqlalchemy", "mlflow.pyfunc", "sqlite3")
    assert imported(probe, *unstated, *needed) == {**dict.fromkeys(unstated, False), **dict.fromkeys(needed, True)}
    (row,) = probe.answers([Path("import:timm")])
    assert row["error"] == "No module named 'timm'"


def test_neither_this_folder_nor_the_parents_packages_are_on_the_path(probe: Isolated) -> None:
    (row,) = probe.answers([Path("path")])
    found = [Path(entry) for entry in json.loads(row["label"])]
    parents = [Path(entry or ".").absolute() for entry in sys.path if "site-packages" in entry]
    assert parents
    assert not {Path.cwd(), Path(__file__).parent.parent, *parents} & set(found)


def test_secrets_of_the_parent_stay_behind(probe: Isolated) -> None:
    (row,) = probe.answers([Path("environment")])
    environment = json.loads(row["label"])
    assert "hunter2" not in environment.values()
    assert environment["PATH"] == os.environ["PATH"]
    assert environment["OMP_NUM_THREADS"] == "1"
    home = Path(environment["HOME"])
    assert home != Path.home()
    assert home.is_dir()
    assert not (home / ".aws").exists()


def test_what_a_model_prints_does_not_mix_with_its_answers(probe: Isolated) -> None:
    rows = probe.answers([Path("print"), Path("sleep:0"), Path("print")])
    assert [row["label"] for row in rows] == ["printed", "slept", "printed"]
    assert probe.peak_memory_bytes() > 0, "the next answer is the next one's"


def test_an_error_of_the_model_is_told_and_does_not_end_it(probe: Isolated) -> None:
    with pytest.raises(BrokenError, match=r"^ValueError: the model is confused$"):
        probe.answers([Path("raise")])
    assert probe.answers([Path("sleep:0")])[0]["label"] == "slept"


def test_a_child_that_dies_is_told_with_its_last_words(saved: Path) -> None:
    with start(REQUIRED) as model:
        model.load(saved)
        with pytest.raises(BrokenError, match=r"^its process ended with status 3 \(these are its last words\)$"):
            model.answers([Path("sleep:0"), Path("exit:3")])
        with pytest.raises(BrokenError, match=r"^its process ended with status 3"):
            model.answers([Path("sleep:0")])


def test_half_an_answer_is_none(saved: Path) -> None:
    with start(REQUIRED) as model:
        model._process.kill()
        model._process.wait()
        reading, writing = os.pipe()
        os.write(writing, b'{"rows": [{"la')
        os.close(writing)
        assert model._process.stdout is not None
        model._process.stdout.close()
        model._process.stdout = os.fdopen(reading)
        with pytest.raises(BrokenError, match="its process ended with status -9"):
            model.answers([])


def test_measured_costs_are_those_of_the_model(tmp_path: Path) -> None:
    """Two of a kind, but for 300 MB; each image takes them 50 ms. A third one dies, a fourth does not load."""
    code = {
        "quick": PROBE, "large": PROBE.replace("MEGABYTES", "300"),
        "dying": PROBE.replace("label = error = None", "os._exit(4)"), "needy": f"import timm\n{PROBE}",
    }  # fmt: skip
    held = np.ones(64 * 2**20)  # 512 MB that the parent has resident are none of the child's
    models = [(name, save(tmp_path / name, text)) for name, text in code.items()]
    found = measure(models, [Path("sleep:0.05"), Path("sleep:0.05")], ["label"])
    assert [item.version for item in found] == list(code)
    quick, large, dying, needy = found
    assert isinstance(quick, Measured)
    assert isinstance(large, Measured)
    assert quick.predicted == large.predicted == {"label": [("slept",), ("slept",)]}
    assert min(quick.latency_ms, large.latency_ms) >= 50
    assert 50e6 < quick.memory_bytes < held.nbytes, "Python, MLflow and pandas"
    assert large.memory_bytes - quick.memory_bytes == pytest.approx(299 * 2**20, rel=0.2)
    files = [path for path in models[0][1].rglob("*") if path.is_file()]
    assert quick.size_bytes == sum(path.stat().st_size for path in files)
    assert isinstance(dying, Broken)
    assert dying.reason.startswith("its process ended with status 4")
    assert isinstance(needy, Broken)
    assert needy.reason == "ModuleNotFoundError: No module named 'timm'"


def test_the_child_ends_when_its_parent_is_killed(saved: Path, tmp_path: Path) -> None:
    """While the model is busy, so that it does not see that nobody asks any more."""
    code = (
        "import sys; from pathlib import Path; from pipeline_steps.isolated import start\n"
        "with start(sys.argv[2:]) as model:\n"
        "    print(model._process.pid, flush=True)\n"
        "    model.load(Path(sys.argv[1]))\n"
        "    model._tell({'do': 'predict', 'paths': ['sleep:100000'], 'top_k': 1})\n"
        "    print('busy', flush=True)\n"
        "    model._hear()\n"
    )
    command = [sys.executable, "-c", code, str(saved), *REQUIRED]
    leftovers = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=leftovers) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.ppid() == parent.pid
        assert parent.stdout.readline() == "busy\n"
        parent.send_signal(signal.SIGKILL)
    try:
        child.wait(timeout=60)  # raises where it goes on
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def test_the_package_answers_with_its_stated_requirements_alone(
    refitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    package = Path(shutil.copytree(refitted / "data" / "refit" / "package", tmp_path / "package"))
    model = Registry("model").save(package, tmp_path / "model")
    shutil.rmtree(package)  # what is saved stands alone
    rows = holdout(refitted)
    paths = [tmp_path / str(sample_id) for sample_id in rows["sample_id"]]
    for path, encoded in zip(paths, encoded_images(refitted, rows["sample_id"]), strict=True):
        path.write_bytes(encoded)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with start(requirements_of(model)) as child:
        child.load(model)
        assert child.load_s > 0
        *answered, refused = child.answers([*paths, broken], top_k=3)
        seconds = child.seconds(paths[:3])
        memory = child.peak_memory_bytes()
    assert refused == {"label": None, "label_probability": None, "label_top_k": None,
                       "error": "it is no image of a known format"}  # fmt: skip
    for row, expected in zip(answered, probabilities(rows), strict=True):
        found = {entry["label"]: entry["probability"] for entry in row["label_top_k"]}
        np.testing.assert_allclose([found[name] for name in CLASSES], expected, atol=1e-4)
        assert row["label"] == CLASSES[expected.argmax()]
    assert len(seconds) == 3
    assert min(seconds) > 0
    assert memory > 100e6, "torch alone is more"


def write_distribution(folder: Path, name: str, *requires: str, files: tuple[str, ...] = ()) -> None:
    """An installed distribution, as pip leaves it."""
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    lines = [f"Requires-Dist: {line}" for line in requires]
    (about / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *lines, ""]))
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    record = [*files, f"{about.name}/METADATA", "../../bin/tool", "__pycache__/single.cpython-311.pyc"]
    (about / "RECORD").write_text("".join(f"{file},sha256=x,1\n" for file in record))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Distributions that require each other."""
    folder = tmp_path / "installed"
    write_distribution(
        folder, "Alpha_Main", "beta", 'gamma; extra == "more"', 'delta; sys_platform == "nowhere"',
        'epsilon; python_version >= "3" and extra != "more"', files=("alpha/__init__.py", "alpha/deep/inner.py"),
    )  # fmt: skip
    write_distribution(folder, "beta", "alpha-main[more]; extra == 'never'", "zeta[full]>=9", files=("beta.py",))
    for name, requires in (("gamma", ()), ("epsilon", ()), ("zeta", ("eta; extra == 'full'",)), ("eta", ("beta",))):
        write_distribution(folder, name, *requires, files=(f"{name}/__init__.py",))
    monkeypatch.syspath_prepend(str(folder))
    return folder


def links(folder: Path, *requirements: str) -> set[str]:
    folder.mkdir()
    link_requirements(requirements, folder)
    assert all(path.is_symlink() and path.exists() for path in folder.iterdir())
    return {path.name for path in folder.iterdir() if not path.name.endswith(".dist-info")}


def test_extras_and_markers_decide_what_is_required(installed: Path, tmp_path: Path) -> None:
    """By hand: beta is always needed, and by it zeta with eta; gamma only by the extra; delta nowhere."""
    assert links(tmp_path / "plain", "alpha.main==1.0") == {"alpha", "beta.py", "zeta", "eta", "epsilon"}
    assert links(tmp_path / "more", "Alpha-Main[more]") == {"alpha", "beta.py", "zeta", "eta", "gamma", "epsilon"}
    assert links(tmp_path / "both", "alpha_main", "alpha_main[more]") >= {"gamma"}
    assert links(tmp_path / "skipped", 'gamma; sys_platform == "nowhere"', "epsilon") == {"epsilon"}
    assert (tmp_path / "plain" / "alpha" / "deep" / "inner.py").exists()
    assert (tmp_path / "plain" / "Alpha_Main-1.0.dist-info" / "METADATA").exists()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("no-such-thing==1.0", "its requirement no-such-thing==1.0 is not installed here"),
        ("needy", "its requirement no-such-thing>=2, which needy needs, is not installed here"),
        ("-r other.txt", "its requirement '-r other.txt' cannot be understood"),
    ],
)
def test_what_is_not_here_is_named(line: str, reason: str, installed: Path, tmp_path: Path) -> None:
    write_distribution(installed, "needy", "beta", "no-such-thing>=2")
    with pytest.raises(BrokenError) as caught, start([line]):
        pass
    assert str(caught.value) == reason


def test_a_model_without_a_list_of_requirements_is_broken(tmp_path: Path) -> None:
    with pytest.raises(BrokenError, match=r"its requirements.txt cannot be read \(No such file or directory\)"):
        requirements_of(tmp_path)
    (tmp_path / "requirements.txt").write_text("mlflow==3.1\n\n  \npandas\n")
    assert requirements_of(tmp_path) == ["mlflow==3.1", "pandas"]


def test_with_the_block_everything_ends(saved: Path) -> None:
    with start(REQUIRED) as model:
        process: Any = psutil.Process(model._process.pid)
        home = model._links
        assert home.is_dir()
    assert not process.is_running()
    assert not home.exists()
