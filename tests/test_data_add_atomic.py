"""`pleat data add` adds completely or not at all: failures, Ctrl-C, kills, full disks."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline_steps import data_add, params, sources
from pipeline_steps.errors import PleatError

pytest_plugins = ["dvc_project"]
Snapshot = Callable[[], dict[str, bytes | None]]
ADD = "import sys; from pipeline_steps.data_add import add; add(*sys.argv[1:])"


def until(condition: Callable[[], bool], child: subprocess.Popen) -> None:
    started = time.monotonic()
    while not condition():
        assert child.poll() is None, "the child ended before it could be interrupted"
        assert time.monotonic() - started < 30
        time.sleep(0.002)


def start(project: Path, source: Path, name: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", ADD, str(source), name],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )


def test_a_dvc_add_that_fails_is_rolled_back(project: Path, clothes: Path, snapshot: Snapshot) -> None:
    """DVC refuses a folder of which git tracks a file."""
    (project / "data" / "raw" / "new").mkdir()
    (project / "data" / "raw" / "new" / "x").touch()
    subprocess.run(["git", "add", "data"], cwd=project, check=True)
    shutil.rmtree(project / "data" / "raw" / "new")
    (project / "data" / "raw" / ".gitignore").write_text("/other\n")
    before = snapshot()
    with pytest.raises(PleatError, match=r"dvc add data/raw/new` failed: .*already tracked by SCM"):
        data_add.add(str(clothes), "new", root=project)
    assert snapshot() == before


def test_a_failure_after_dvc_add_takes_back_what_dvc_wrote(
    project: Path, clothes: Path, monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot
) -> None:
    """Somebody breaks params.yaml while the real `dvc add` runs."""
    (project / "data" / "raw" / ".gitignore").write_text("/other\n")
    before = snapshot()
    run_child = sources.run_child

    def then_break(command: list[str], **options: object) -> None:
        run_child(command, **options)
        assert (project / "data" / "raw" / "new.dvc").is_file()
        assert "/new\n" in (project / "data" / "raw" / ".gitignore").read_text()
        (project / "params.yaml").write_text("experiment: [")

    monkeypatch.setattr(sources, "run_child", then_break)
    with pytest.raises(PleatError, match=r"params\.yaml is not valid YAML"):
        data_add.add(str(clothes), "new", root=project)
    assert snapshot() == {**before, "params.yaml": b"experiment: ["}


def test_ctrl_c_in_the_middle_of_a_copy_leaves_nothing(project: Path, endless: Path, snapshot: Snapshot) -> None:
    before = snapshot()
    child = start(project, endless, "new")
    copy = project / "data" / "raw" / ".adding-new" / "new" / "Hat" / "a.jpg"
    until(lambda: copy.exists() and copy.stat().st_size > 0, child)
    child.send_signal(signal.SIGINT)
    assert child.wait(30) != 0
    assert snapshot() == before


def test_what_a_killed_copy_left_is_swept_by_the_next_add(project: Path, endless: Path, clothes: Path) -> None:
    child = start(project, endless, "old")
    copy = project / "data" / "raw" / ".adding-old" / "old" / "Hat" / "a.jpg"
    until(lambda: copy.exists() and copy.stat().st_size > 0, child)
    with pytest.raises(PleatError, match=r"Another `pleat data add`, or .*, is at work here"):
        data_add.add(str(clothes), "new", root=project)
    child.kill()
    child.wait()
    assert copy.exists()
    # What a person has put in the place since then is theirs and stays.
    (project / "data" / "raw" / "old").mkdir()
    with pytest.raises(PleatError, match="exists already"):
        data_add.add(str(clothes), "old", root=project)
    assert sorted(path.name for path in (project / "data" / "raw").iterdir()) == ["old"]


def test_an_add_killed_while_dvc_works_is_taken_back_by_the_next(project: Path, clothes: Path) -> None:
    child = start(project, clothes, "new")
    until(lambda: bool(psutil.Process(child.pid).children()), child)
    dvc = psutil.Process(child.pid).children()[0]
    dvc.suspend()
    child.kill()
    child.wait()
    assert params.load(project / "params.yaml").experiment.batches == ["sample"]
    # dvc outlives its parent; nothing may be swept under it.
    with pytest.raises(PleatError, match="the `dvc add` of a killed one, is at work here"):
        data_add.add(str(clothes), "new", root=project)
    dvc.resume()
    psutil.wait_procs([dvc], timeout=30)
    data_add.add(str(clothes), "new", root=project)
    raw = project / "data" / "raw"
    assert sorted(path.name for path in raw.iterdir()) == [".gitignore", "new", "new.dvc"]
    assert (raw / ".gitignore").read_text() == "/new\n"
    assert params.load(project / "params.yaml").experiment.batches == ["sample", "new"]


@pytest.fixture
def mounted(project: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system at data/raw, with the options given."""
    raw = project / "data" / "raw"
    done = []

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(raw)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("file systems cannot be mounted here (that needs root)")
        done.append(raw)
        return raw

    yield mount
    for path in done:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk(project: Path, clothes: Path, mounted: Callable[[str], Path], snapshot: Snapshot) -> None:
    raw = mounted("size=1m")
    (clothes / "images" / "a.jpg").write_bytes(os.urandom(3_000_000))
    before = snapshot()
    with pytest.raises(PleatError, match=r"No space is left for .*clothes in .*data/raw: .*nothing was left behind"):
        data_add.add(str(clothes), "new", root=project)
    assert snapshot() == before
    assert shutil.disk_usage(raw).used == 0


def test_a_read_only_file_system(
    project: Path, clothes: Path, mounted: Callable[[str], Path], snapshot: Snapshot
) -> None:
    mounted("ro")
    before = snapshot()
    with pytest.raises(PleatError, match=r"Could not bring .*clothes to .*new: Read-only file system"):
        data_add.add(str(clothes), "new", root=project)
    assert snapshot() == before


def test_a_file_where_the_data_should_go(project: Path, clothes: Path, snapshot: Snapshot) -> None:
    shutil.rmtree(project / "data")
    (project / "data").write_text("no folder")
    before = snapshot()
    with pytest.raises(PleatError, match=r"Could not bring .*clothes to .*new: Not a directory"):
        data_add.add(str(clothes), "new", root=project)
    assert snapshot() == before


def test_a_file_larger_than_the_limit(project: Path, clothes: Path, snapshot: Snapshot) -> None:
    """As a full disk, where nothing can be mounted."""
    (clothes / "images" / "a.jpg").write_bytes(os.urandom(300_000))
    before = snapshot()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(PleatError, match=r"No space is left for .*: File too large"):
            data_add.add(str(clothes), "new", root=project)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert snapshot() == before
