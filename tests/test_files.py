"""Nothing half-written is ever taken for finished."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import names

from pipeline_steps.errors import PleatError
from pipeline_steps.files import (
    atomic_folder,
    atomic_path,
    read_json,
    read_parquet,
    write_csv,
    write_json,
    write_parquet,
    write_text,
)

# Says that it has begun to write, then waits to be killed.
WRITER = """
import sys
from pathlib import Path
from pipeline_steps.files import atomic_folder, atomic_path
target = Path(sys.argv[1])
manager = {"file": atomic_path, "folder": atomic_folder}[sys.argv[2]](target)
with manager as partial:
    (partial / "half" if sys.argv[2] == "folder" else partial).write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def start_writer(target: Path, kind: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    return child


def write(target: Path, kind: str, text: str) -> None:
    with (atomic_path if kind == "file" else atomic_folder)(target) as partial:
        (partial if kind == "file" else partial / "whole").write_text(text)


def read(target: Path, kind: str) -> str:
    return (target if kind == "file" else target / "whole").read_text()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_written_replaces_what_was_there(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "deep" / "er" / "name"
    for text in ("first", "second"):
        write(target, kind, text)
        assert read(target, kind) == text
    assert names(target.parent) == ["name"]
    if kind == "folder":
        assert names(target) == ["whole"], "files of the folder before must be gone"


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, PleatError])
def test_a_failure_keeps_the_old_and_leaves_nothing_new(tmp_path: Path, kind: str, error: type[BaseException]) -> None:
    target = tmp_path / "name"
    write(target, kind, "old")

    def fail_half_way() -> None:
        with (atomic_path if kind == "file" else atomic_folder)(target) as partial:
            (partial if kind == "file" else partial / "whole").write_text("half")
            raise error("half way")

    with pytest.raises(error):
        fail_half_way()
    assert read(target, kind) == "old"
    assert names(tmp_path) == ["name"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_writer_leaves_nothing_under_the_name_and_is_swept_up(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "name"
    child = start_writer(target, kind)
    left = f".partial-{child.pid}-name"
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert names(tmp_path) == [left]
    write(target, kind, "whole")
    assert names(tmp_path) == ["name"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_two_writers_side_by_side_both_finish(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "name"
    child = start_writer(target, kind)
    write(target, kind, "ours")
    assert (tmp_path / f".partial-{child.pid}-name").exists(), "a living process's work must stay"
    child.communicate()
    assert child.returncode == 0
    assert names(tmp_path) == ["name"]
    assert (target / "half" if kind == "folder" else target).read_text() == "half", "who finishes last stays"


def test_only_this_names_left_overs_are_swept_up(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ours = [f".partial-{gone.pid}-name", f".partial-{os.getpid()}-name", f".partial-{10**30}-name"]
    ours.append(f".partial-{gone.pid}-name.replaced")
    others = [f".partial-{gone.pid}-other", f".partial-{gone.pid}-name.more", f".partial-{os.getppid()}-name"]
    others += [".partial-x-name", f".partial-{gone.pid}-a-name", "name.partial"]
    for name in ours[:2] + others[:3]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    for name in ours[2:] + others[3:]:
        (tmp_path / name).touch()
    write_text(tmp_path / "name", "text")
    assert names(tmp_path) == sorted([*others, "name"])


def test_a_full_disk_is_a_sentence_and_leaves_nothing(small_disk: Path) -> None:
    noise = pd.DataFrame({"noise": [np.random.default_rng(0).bytes(2**21)]})
    writers = {
        "text": lambda path: write_text(path, "x" * 2**21),
        "json": lambda path: write_json(path, "x" * 2**21),
        "parquet": lambda path: write_parquet(path, noise),
        "csv": lambda path: write_csv(path, pd.DataFrame({"text": ["x" * 2**21]})),
    }
    for name, writer in writers.items():
        with pytest.raises(PleatError) as caught:
            writer(small_disk / "inner" / name)
        assert str(caught.value) == (
            f"Could not write {small_disk / 'inner' / name}: No space left on device. Free some space or make "
            "the folder writable, then run the same command again; nothing was left behind."
        )
        assert names(small_disk / "inner") == []


def test_a_full_disk_inside_a_folder_names_the_folder_that_the_reader_knows(small_disk: Path) -> None:
    def stage() -> None:
        with atomic_folder(small_disk / "stage") as partial:
            write_text(partial / "small", "fits")
            write_text(partial / "large", "x" * 2**21)

    with pytest.raises(PleatError) as caught:
        stage()
    assert str(caught.value).startswith(f"Could not write {small_disk / 'stage' / 'large'}: No space left")
    assert names(small_disk) == []


@pytest.mark.parametrize(
    ("error", "told"),
    [(FileNotFoundError(errno.ENOENT, "no such file", "weights"), False), (ConnectionError("no network"), False),
     (OSError(errno.ENOSPC, "full"), True), (OSError(errno.EDQUOT, "quota"), True)],
)  # fmt: skip
def test_only_errors_of_writing_inside_a_folder_are_told_as_such(error: OSError, told: bool, tmp_path: Path) -> None:
    with pytest.raises(PleatError if told else type(error)) as caught, atomic_folder(tmp_path / "stage"):
        raise error
    assert ("Could not write" in str(caught.value)) == told
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_a_sentence(read_only: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, reason in [(read_only, "Read-only file system"), (tmp_path / "file", "(Not a directory|File exists)")]:
        for kind in ("file", "folder"):
            for target in (place / "name", place / "inner" / "name"):
                with pytest.raises(PleatError, match=rf"^Could not write {target}: {reason}\. Free some space or make"):
                    write(target, kind, "text")


def test_files_have_the_same_bytes_for_the_same_values(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["ä", ""], "number": [1 / 3, 2.0]})
    for name in ("a", "b"):
        write_json(tmp_path / f"{name}.json", {"b": 1, "a": ["ä"]})
        write_parquet(tmp_path / f"{name}.parquet", frame)
        write_csv(tmp_path / f"{name}.csv", frame)
    for suffix in ("json", "parquet", "csv"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": ["ä"], "b": 1}
    assert (tmp_path / "a.csv").read_text() == "text,number\nä,0.333333\n,2\n"
    pd.testing.assert_frame_equal(read_parquet(tmp_path / "a.parquet"), frame)
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "nan.json", float("nan"))
    assert not (tmp_path / "nan.json").exists()


@pytest.mark.parametrize("reader", [read_json, read_parquet])
def test_an_absent_input_says_what_to_run(tmp_path: Path, reader: object) -> None:
    with pytest.raises(PleatError, match=r"name is missing: the stage that writes it has not run; run `dvc repro`\.$"):
        reader(tmp_path / "name")  # type: ignore[operator]
