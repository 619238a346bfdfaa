import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

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


@pytest.fixture
def clothing(tmp_path: Path) -> Path:
    """Eight images of two classes in the form of the clothing set, and a row without its file."""
    (tmp_path / "images").mkdir()
    rows = ["image,label"]
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (70, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.jpg", quality=95)
        rows.append(f"{number},{'Hat' if number % 2 else 'T-Shirt'}")
    (tmp_path / "images.csv").write_text("\n".join([*rows, "gone,Hat"]))
    return tmp_path


def test_a_gpu_benchmark_without_a_gpu_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["engine_gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    load("engine_gpu").main()
    assert capsys.readouterr().out == "Skipped: CUDA shows no GPU, and training on one is what this measures.\n"


def test_both_sides_of_the_gpu_benchmark_run_on_a_cpu(clothing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine_gpu = load("engine_gpu")
    prepared = engine_gpu.prepare(clothing, clothing / "prepared", size=32)
    bench = engine_gpu.Bench(prepared, torch.device("cpu"), batch_size=2, n_batches=3, n_workers=0)
    rates = engine_gpu.measure(bench, "test_resnet", 1, (False,))
    engine_gpu.print_verdicts("test_resnet", rates, (False,))
    assert [len(found) for found in rates.values()] == [1] * 4
    assert min(rate for found in rates.values() for rate in found) > 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("images/s" in line for line in lines) == 4
    assert sum("target >= 0.95" in line for line in lines) == 2
    assert sum("target >= 1.2" in line for line in lines) == 1


def test_both_sides_of_the_gpu_benchmark_see_the_same_images(clothing: Path) -> None:
    """Each of timm's is one of Pleat's of the same class, plain or mirrored, up to the rounding of the resize."""
    engine_gpu = load("engine_gpu")
    prepared = engine_gpu.prepare(clothing, clothing / "prepared", size=64)
    bench = engine_gpu.Bench(prepared, torch.device("cpu"), batch_size=2, n_batches=12, n_workers=0)
    loader = bench.loader()
    assert len(loader) == 12
    ours = torch.from_numpy(np.array(prepared.values)).float()
    mirrored = 0
    for images, truth in loader:
        for image, code in zip(images * loader.std + loader.mean, truth, strict=True):
            apart = [(image - view).abs().mean((1, 2, 3)) for view in (ours, ours.flip(3))]
            plain, turned = (float(one.min()) for one in apart)
            assert min(plain, turned) < 2 < 20 < max(plain, turned)
            assert prepared.codes[int(apart[turned < plain].argmin())] == code
            mirrored += turned < plain
    assert 0 < mirrored < 24


def test_a_clock_leaves_out_the_first_batches_and_the_last_step_in(monkeypatch: pytest.MonkeyPatch) -> None:
    engine_gpu, rates, now = load("engine_gpu"), [], [0.0]
    monkeypatch.setattr(engine_gpu.time, "perf_counter", lambda: now[0])
    for batch in engine_gpu.clocked(iter([50.0, 9.0, 1.0, 2.0, 5.0]), 2, 4, torch.device("cpu"), rates):
        now[0] += batch  # the step
    assert rates == [3 * 4 / 8.0]


def test_absent_data_ends_with_a_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / "ingest.py"], env={"PLEAT_TEST_DATA": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"{tmp_path} holds no data/clothing/images.csv")
