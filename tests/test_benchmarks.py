import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts import each other as they do when one of them is run; afterwards they are forgotten."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in set(SCRIPTS) & (set(sys.modules) - before):
        del sys.modules[name]


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_imported(name: str) -> None:
    assert Path(load(name).__file__ or "").parent == FOLDER


def test_names_hide_no_module_of_the_tests() -> None:
    assert not set(SCRIPTS) & {path.stem for path in Path(__file__).parent.glob("*.py")}


def test_stages_are_read_from_what_dvc_prints() -> None:
    clone = load("clone")
    lines = [
        (0.5, "'data/raw/clothing.dvc' didn't change, skipping"),
        (1.0, "Running stage 'ingest@clothing':"),
        (1.1, "> pleat ingest clothing"),
        (8.0, "Stage 'validate' didn't change, skipping"),
        (8.5, "Stage 'split' is cached - skipping run, checking out outputs"),
        (9.0, "Running stage 'train@small-0':"),
    ]
    watched = clone.Watched(seconds=12.0, lines=lines)
    assert clone.stages(watched) == {
        "ingest@clothing": ("ran", 7.0),
        "validate": ("unchanged", 0.5),
        "split": ("from the cache", 0.5),
        "train@small-0": ("ran", 3.0),
    }
    assert clone.ran(watched) == ["ingest@clothing", "train@small-0"]


def test_a_command_is_watched(tmp_path: Path) -> None:
    clone = load("clone")
    script = "import time; filled = b'x' * 2**27; print('here', flush=True); time.sleep(1); print('there')"
    watched = clone.watch([sys.executable, "-c", script], tmp_path, clone.users_environment(tmp_path))
    assert [line for _, line in watched.lines] == ["here", "there"]
    assert watched.lines[1][0] - watched.lines[0][0] > 0.9
    assert 2**27 < watched.peak_bytes < 2**28


def test_a_command_that_fails_ends_the_script_with_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)failed with status 3:.*the reason"):
        load("clone").watch([sys.executable, "-c", "print('the reason'); exit(3)"], tmp_path, {})


def test_commands_get_a_users_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    env = load("clone").users_environment(tmp_path / "pleat", code=tmp_path)
    assert not {"PYTHONDONTWRITEBYTECODE", "MLFLOW_TRACKING_URI"} & set(env)
    assert env["PYTHONPATH"] == str(tmp_path)


def test_rounds_alternate_and_medians_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    measure = load("measure")
    order = []
    rates = {"slow": iter([1.0, 2.0, 90.0]), "fast": iter([6.0, 5.0, 7.0])}

    def rate(name: str) -> float:
        order.append(name)
        return next(rates[name])

    found = measure.alternate({name: lambda name=name: rate(name) for name in rates}, rounds=3)
    assert order == ["slow", "fast"] * 3
    assert measure.ratio(found, "fast", "slow") == 3.0
    measure.print_rates(found, "images/s", "slow")
    assert "6.0 images/s  x  3.00   (rounds 5 to 7)" in capsys.readouterr().out


def test_a_target_holds_or_fails() -> None:
    verdict = load("measure").verdict
    assert verdict("time", 119.9, "<=", 120, " s") == "  holds  time: 119.9 s (target <= 120 s)"
    assert verdict("speed", 499, ">=", 500) == "  FAILS  speed: 499 (target >= 500)"


def test_a_busy_machine_is_named() -> None:
    warning = load("measure").busy_warning
    assert warning(0.05, 0.1) == ""
    assert "50% of it before" in warning(0.5, 0.0)
    assert "25% during" in warning(0.0, 0.25)


def test_the_leaderboard_is_there_before_the_last_stages() -> None:
    clone = load("clone")
    lines = [(1.0, "Running stage 'compare':"), (5.0, "Running stage 'refit':"), (8.0, "Running stage 'register':")]
    assert load("pipeline").until_leaderboard(clone.Watched(seconds=10.0, lines=lines)) == 5.0


def test_stages_before_the_head_are_found() -> None:
    names = ["prepare@m-b", "train@m-0", "evaluate@m", "compare"]
    assert load("pipeline").not_of_the_head(names) == ["prepare@m-b"]


def test_absent_data_ends_with_a_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / "ingest.py"], env={"PLEAT_TEST_DATA": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"{tmp_path} holds no data/clothing/images.csv")
