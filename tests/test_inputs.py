"""Prepared arrays: the same batches wherever the values lie, against plain indexing by numpy."""

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_steps import train
from pipeline_steps.errors import PleatError
from pipeline_steps.files import write_json
from pipeline_steps.train import load_inputs
from pipeline_steps.vision import inputs as vision_inputs
from pipeline_steps.vision.inputs import CPU, Arrays, Features, Inputs, Pixels, streamed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA shows")
KINDS = pytest.mark.parametrize("kind", [Features, Pixels])


def numbers(n: int, kind: type[Inputs] = Pixels, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind is Features:
        return rng.normal(size=(n, 2, 7)).astype(np.float32)
    return rng.integers(0, 256, (n, 3, 6, 6), dtype=np.uint8)


def drawn(n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, some of them again and again, and which are mirrored."""
    generator = torch.Generator().manual_seed(m)
    return torch.randint(0, n, (m,), generator=generator), torch.rand(m, generator=generator) < 0.5


def by_numpy(values: np.ndarray, rows: torch.Tensor, mirrored: torch.Tensor, batch_size: int) -> list[np.ndarray]:
    pairs = zip(rows.tolist(), mirrored.tolist(), strict=True)
    if values.ndim == 3:
        picked = [values[row, int(turned)] for row, turned in pairs]
    else:
        picked = [values[row][:, :, ::-1] if turned else values[row] for row, turned in pairs]
    return [np.stack(picked[start : start + batch_size]) for start in range(0, len(picked), batch_size)]


def scattered(values: np.ndarray, n_parts: int = 3) -> Arrays:
    """The same rows, dealt out to several arrays in another order, beside rows that are not asked for."""
    rng = np.random.default_rng(1)
    part, row = rng.integers(0, n_parts, len(values)), rng.permutation(len(values) + 5)[: len(values)]
    parts = []
    for number in range(n_parts):
        array = rng.integers(0, 99, (len(values) + 5, *values.shape[1:])).astype(values.dtype)
        array[row[part == number]] = values[part == number]
        parts.append(array)
    return Arrays(tuple(parts), part, row)


def equal(found: Iterator[torch.Tensor], expected: list[np.ndarray]) -> None:
    batches = list(found)
    assert len(batches) == len(expected)
    for batch, wanted in zip(batches, expected, strict=True):
        assert batch.dtype == torch.from_numpy(wanted[:0].copy()).dtype
        np.testing.assert_array_equal(batch.cpu().numpy(), wanted)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("inputs")]


@KINDS
@pytest.mark.parametrize("m", [1, 16, 50])
def test_batches_are_what_numpy_picks(kind: type[Inputs], m: int) -> None:
    values, (rows, mirrored) = numbers(20, kind), drawn(20, m)
    inputs = kind(torch.from_numpy(values)).to(CPU)
    expected = by_numpy(values, rows, mirrored, 16)
    equal(inputs.batches(rows, mirrored, 16), expected)
    np.testing.assert_array_equal(inputs.batch(rows[:16], mirrored[:16]).numpy(), expected[0])


def test_pixels_of_several_arrays_are_read_as_those_of_one() -> None:
    values, (rows, mirrored) = numbers(40), drawn(40, 70)
    arrays = scattered(values)
    assert arrays.shape == values.shape
    assert arrays.nbytes == values.nbytes
    equal(Pixels(arrays).to(CPU).batches(rows, mirrored, 16), by_numpy(values, rows, mirrored, 16))


def test_arrays_are_loaded_whole_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_inputs, "ROWS_A_COPY", 7)
    np.testing.assert_array_equal(scattered(numbers(40)).to(CPU).numpy(), numbers(40))


@KINDS
@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 60), batch_size=st.integers(1, 25), n_parts=st.integers(1, 3))
def test_streamed_batches_are_what_numpy_picks(
    kind: type[Inputs], inference: bool, m: int, batch_size: int, n_parts: int
) -> None:
    """More and fewer batches than are read ahead; all of them kept, so none may be written over."""
    values, (rows, mirrored) = numbers(20, kind), drawn(20, m)
    with torch.inference_mode(inference):
        found = streamed(scattered(values, n_parts), kind.view, rows, mirrored, batch_size, CPU)
        equal(found, by_numpy(values, rows, mirrored, batch_size))
    assert not threads()


def test_an_epoch_without_rows_is_one_empty_batch_in_both_ways() -> None:
    """As torch splits no rows; so what is concatenated over the batches has its shape."""
    arrays, none = scattered(numbers(9)), (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool))
    for found in (Pixels(arrays).batches(*none, 4), streamed(arrays, Pixels.view, *none, 4, CPU)):
        assert [tuple(batch.shape) for batch in found] == [(0, 3, 6, 6)]


class Watched(Arrays):
    """Arrays that note which rows were asked for, and break at row 13."""

    asked: list[list[int]] = []  # noqa: RUF012

    def read(self, rows: torch.Tensor, out: np.ndarray) -> None:
        self.asked.append(rows.tolist())
        if 13 in rows:
            raise OSError("the disk is gone")
        super().read(rows, out)


@pytest.fixture
def watched() -> Watched:
    Watched.asked.clear()
    values = numbers(40)
    return Watched((values,), np.zeros(40, np.int64), np.arange(40))


def test_an_error_in_the_reading_thread_reaches_the_loop_after_the_batches_before(watched: Watched) -> None:
    rows = torch.arange(40)
    found = streamed(watched, Pixels.view, rows, rows < 0, 4, CPU)
    for _ in range(3):
        next(found)
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)
    assert not threads()


def test_leaving_the_loop_early_ends_the_threads(watched: Watched) -> None:
    rows = torch.cat([torch.arange(13), torch.arange(14, 40)])
    found = streamed(watched, Pixels.view, rows, rows < 0, 1, CPU)
    next(found)
    assert threads()
    found.close()
    assert not threads()
    assert len(watched.asked) <= 1 + vision_inputs.AHEAD, "only a few batches are read ahead"


def test_an_error_in_the_loop_ends_the_threads(watched: Watched) -> None:
    def train() -> None:
        rows = torch.arange(13)
        for _ in streamed(watched, Pixels.view, rows, rows < 0, 2, CPU):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert not threads()


@pytest.mark.parametrize("short_of", [0, 1], ids=["enough", "too little"])
def test_the_device_takes_what_fits_into_half_of_its_free_memory(
    short_of: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On torch's device without memory, which needs no GPU."""
    device, values = torch.device("meta"), torch.from_numpy(numbers(10))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda of: (2 * 10 * 108 - short_of, 80 * 2**30))
    for held in (values, scattered(numbers(10))):
        inputs = Pixels(held).to(device)
        assert inputs.device == device
        assert getattr(inputs.values, "device", CPU) == (CPU if short_of else device)


def write_prepared(root: Path, batch: str, names: list[str], values: np.ndarray) -> None:
    folder = root / "data" / "prepare" / "cnn" / batch
    folder.mkdir(parents=True)
    np.save(folder / "inputs.npy", values)
    write_json(folder / "sample_ids.json", names)
    kind = "features" if values.ndim == 3 else "pixels"
    write_json(folder / "inputs.json", {"kind": kind, "sha256": batch})


@pytest.fixture(params=["in memory", "on disk", "on disk, for a container"])
def memory(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether six samples' pixels are more than a quarter of what is free, or of what the container may take."""
    enough, limit = 4 * 6 * 108, tmp_path / "memory.max"
    free = psutil.virtual_memory()._replace(available=enough - (request.param == "on disk"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    limit.write_text(f"{enough - 1}\n" if request.param == "on disk, for a container" else "max\n")
    monkeypatch.setattr(train, "CONTAINER_LIMIT", limit)
    return request.param


def test_prepared_pixels_are_joined_to_the_samples_in_memory_and_on_disk(tmp_path: Path, memory: str) -> None:
    """Image b came again in the second batch: the first copy counts. Image z was left out by validation."""
    first, second = numbers(4), numbers(4, seed=1)
    write_prepared(tmp_path, "one", ["e", "b", "z", "a"], first)
    write_prepared(tmp_path, "two", ["b", "f", "c", "d"], second)
    samples = pd.DataFrame({"sample_id": list("fedcba"), "label": list("123456")})
    inputs, ordered, version = load_inputs(tmp_path, "cnn", ["one", "two"], samples)
    assert isinstance(inputs, Pixels)
    assert isinstance(inputs.values, torch.Tensor if memory == "in memory" else Arrays)
    assert ordered["sample_id"].tolist() == list("abcdef")
    assert ordered["label"].tolist() == list("654321")
    assert version == "one-two"
    expected = np.stack([first[3], first[1], second[2], second[3], first[0], second[1]])
    rows, mirrored = drawn(6, 20)
    equal(inputs.to(CPU).batches(rows, mirrored, 8), by_numpy(expected, rows, mirrored, 8))


def test_memory_maps_go_to_another_process_by_their_paths(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", numbers(4))
    parts = np.load(tmp_path / "one.npy", mmap_mode="r"), numbers(3, seed=1)
    arrays = Arrays(parts, np.array([0, 1, 0]), np.array([3, 0, 1]))
    sent = pickle.dumps(Pixels(arrays))
    np.save(tmp_path / "one.npy", numbers(4, seed=2))
    received = pickle.loads(sent)
    expected = np.stack([numbers(4, seed=2)[3], numbers(3, seed=1)[0], numbers(4, seed=2)[1]])
    np.testing.assert_array_equal(received.values.to(CPU), expected)


def test_features_are_always_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory()._replace(available=0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    write_prepared(tmp_path, "one", ["b", "a"], numbers(2, Features))
    inputs, _, _ = load_inputs(tmp_path, "cnn", ["one"], pd.DataFrame({"sample_id": ["a", "b"]}))
    assert isinstance(inputs, Features)
    np.testing.assert_array_equal(inputs.values.numpy(), numbers(2, Features)[::-1])


def test_a_sample_that_no_batch_holds_is_one_sentence(tmp_path: Path, memory: str) -> None:
    write_prepared(tmp_path, "one", ["a", "b"], numbers(2))
    samples = pd.DataFrame({"sample_id": ["a", "b", "c" * 64]})
    with pytest.raises(PleatError, match=r"^data/prepare/cnn lacks 1 samples of the folds, such as c{12}; run"):
        load_inputs(tmp_path, "cnn", ["one"], samples)


@needs_gpu
@KINDS
@pytest.mark.parametrize("share", [1.0, 0.0], ids=["on the device", "streamed"])
@pytest.mark.parametrize("source", ["tensor", "arrays"])
def test_batches_on_a_gpu(kind: type[Inputs], share: float, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps that take longer than the copies, so that a slot written too early would show."""
    monkeypatch.setattr(vision_inputs, "DEVICE_SHARE", share)
    values, (rows, mirrored), device = numbers(500, kind), drawn(500, 4000), torch.device("cuda", 0)
    expected = by_numpy(values, rows, mirrored, 64)
    held = torch.from_numpy(values) if source == "tensor" or kind is Features else scattered(values)
    inputs = kind(held).to(device)
    assert (getattr(inputs.values, "device", CPU).type == "cuda") == (share > 0)
    busy, sums = torch.randn(2048, 2048, device=device), []
    for batch in inputs.batches(rows, mirrored, 64):
        assert batch.device == device
        for _ in range(5):
            busy = (busy @ busy).tanh()
        sums.append(batch.double().flatten(1).cumsum(1).sum())
    expected = [batch.reshape(len(batch), -1).cumsum(1, dtype=float).sum() for batch in expected]
    np.testing.assert_allclose(torch.stack(sums).cpu(), expected, rtol=1e-9, atol=1e-6)


@needs_gpu
def test_leaving_the_loop_early_on_a_gpu_frees_its_memory() -> None:
    device, (rows, mirrored) = torch.device("cuda", 0), drawn(500, 4000)
    before = torch.cuda.memory_allocated(device)
    for _ in range(3):
        for batch in streamed(scattered(numbers(500)), Pixels.view, rows, mirrored, 64, device):
            np.testing.assert_array_equal(batch.cpu(), by_numpy(numbers(500), rows[:64], mirrored[:64], 64)[0])
            break
        del batch
        assert torch.cuda.memory_allocated(device) == before
    assert not threads()
