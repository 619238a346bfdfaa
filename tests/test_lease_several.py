"""Leases of several devices at once: all or none, and nobody waits for ever."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline_steps.errors import PleatError
from pipeline_steps.vision import lease as leases
from pipeline_steps.vision.lease import lease, lease_several


@contextmanager
def current(_: torch.device) -> Iterator[None]:
    yield


@pytest.fixture(autouse=True)
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only their names are asked for; the locks are real."""
    monkeypatch.setenv("PLEAT_LEASES", str(tmp_path / "leases"))
    monkeypatch.setattr(leases, "POLL_S", 0.005)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"gpu-{index}"))
    monkeypatch.setattr(torch.cuda, "device", current)


def test_they_are_different_and_free_again_afterwards() -> None:
    for _ in range(2):
        with lease_several("both", 2) as devices:
            assert devices == [torch.device("cuda", 0), torch.device("cuda", 1)]
    with lease("one") as device:
        assert device == torch.device("cuda", 0)


def test_two_that_want_all_take_turns() -> None:
    """Each would hold one device and wait for the other's, if both gathered at the same time."""
    inside: list[str] = []
    together: list[int] = []

    def train(name: str) -> None:
        for _ in range(10):
            with lease_several(name, 2):
                inside.append(name)
                together.append(len(inside))
                inside.remove(name)

    threads = [threading.Thread(target=train, args=(name,), daemon=True) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert together == [1] * 20


def test_more_than_there_are_is_one_sentence() -> None:
    with pytest.raises(PleatError) as caught, lease_several("train net fold 0", 3):
        pass
    assert str(caught.value) == (
        "train net fold 0: `devices` is 3, but this machine shows 2 GPUs; "
        "lower it, or let CUDA_VISIBLE_DEVICES show more."
    )


def test_without_gpus_the_cpu_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with lease_several("spread", 3) as devices:
        assert devices == [torch.device("cpu")] * 3
