"""What several tests share: drawn images, small batches, params with overrides, child processes, the real data."""

import copy
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from ruamel.yaml import YAML

from pipeline_steps import params
from pipeline_steps.params import Params

if TYPE_CHECKING:
    from airflow_served import Served

# A shell starts background processes with SIGINT ignored, which the commands under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parent.parent
PROMOTION_AND_INBOX = """\
profile: {latency: false, images: 0}
compress: {techniques: {}, candidate: null}
promotion:
  model: pleat
  mode: auto
  floors: {f1_weighted: 0.5, f1_macro: 0.4}
  min_gain: 0.0
  confidence: 0.95
  max_class_drop: 0.2
  max_cost: {latency: 1.5, memory: 2.0, size: 2.0}
inbox:
  source: data/inbox
  every_minutes: 30
  settle_s: 60
  max_drift: {label_shares: 0.5, image_statistics: 0.5, new_labels: false}
"""
TEST_DATA = Path(os.environ.get("PLEAT_TEST_DATA", "../shared"))
PLEAT = [sys.executable, "-c", "from pipeline_steps.cli import main; main()"]
MANIFEST_COLUMNS = ["sample_id", "width", "height", "n_bytes", "phash", "source_path", "sender_id", "given", "batch"]


def document(overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The repository's params.yaml as a dictionary, with values set by dotted key (numbers index lists)."""
    settings = copy.deepcopy(YAML(typ="safe").load(REPOSITORY / "params.yaml"))
    for key, value in (overrides or {}).items():
        block = settings
        *parents, last = (int(part) if part.isdigit() else part for part in key.split("."))
        for part in parents:
            block = block[part]
        block[last] = value
    return settings


def load_params(overrides: Mapping[str, Any] | None = None) -> Params:
    return params.check(document(overrides), "params.yaml")


def write_params(root: Path, overrides: Mapping[str, Any] | None = None) -> None:
    YAML().dump(document(overrides), root / "params.yaml")


def draw(seed: int, width: int = 48, height: int = 64) -> Image.Image:
    """A picture of soft coloured blobs; different seeds look different enough not to be near copies."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, image_format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def write_batch(
    root: Path, name: str, rows: Mapping[str, str | tuple[str, str]], files: Mapping[str, bytes | None]
) -> Path:
    """Writes a clothing_csv batch.

    Args:
        root: the workspace.
        name: the batch.
        rows: image id to label, or to (label, sender).
        files: path in images/ to content; None makes no file.
    """
    folder = root / "data" / "raw" / name
    (folder / "images").mkdir(parents=True)
    for path, content in files.items():
        if content is not None:
            (folder / "images" / path).write_bytes(content)
    cells = {image: (row, "") if isinstance(row, str) else row for image, row in rows.items()}
    table = pd.DataFrame(
        [(image, sender, label, False) for image, (label, sender) in cells.items()],
        columns=["image", "sender_id", "label", "kids"],
    )
    table.to_csv(folder / "images.csv", index=False)
    return folder


def write_ingested(root: Path, batch: str, rows: list[dict[str, Any]], quarantine: list[dict[str, str]] = []) -> None:  # noqa: B006
    """Writes what `ingest` leaves of a batch, without images; a row gives labels and what matters besides them."""
    filled = [
        {
            "sample_id": f"{batch}{number}".encode().hex().rjust(64, "0"),
            "width": 64,
            "height": 64,
            "n_bytes": 1000,
            "phash": "0" * 16,
            "source_path": f"images/{number}.jpg",
            "sender_id": "",
            "given": "",
            "batch": batch,
            **row,
        }
        for number, row in enumerate(rows)
    ]
    folder = root / "data" / "ingest" / batch
    folder.mkdir(parents=True)
    labels = [column for column in (rows[0] if rows else ["label"]) if column not in MANIFEST_COLUMNS]
    pd.DataFrame(filled, columns=[*MANIFEST_COLUMNS, *labels]).to_parquet(folder / "manifest.parquet", index=False)
    left_out = [{"batch": batch, "detail": "", **row} for row in quarantine]
    columns = ["batch", "source_path", "label", "reason", "detail"]
    pd.DataFrame(left_out, columns=columns, dtype="str").to_parquet(folder / "quarantine.parquet", index=False)


def pleat(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PLEAT, *arguments], cwd=root, capture_output=True, text=True, timeout=120)


def names(folder: Path) -> list[str]:
    """What lies directly in a folder, hidden things included."""
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True, scope="session")
def leases(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests must not wait for somebody's real training."""
    os.environ["PLEAT_LEASES"] = str(tmp_path_factory.mktemp("leases"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty workspace with the repository's expectations."""
    shutil.copytree(REPOSITORY / "data" / "expectations", tmp_path / "data" / "expectations")
    return tmp_path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    yield from _mounted(tmp_path / "disk", "size=1m")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """An empty folder that nobody can write to, root included."""
    yield from _mounted(tmp_path / "read_only", "ro")


def _mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a tmpfs, which takes Linux and root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real inputs (PLEAT_TEST_DATA)."""
    folder = (REPOSITORY / TEST_DATA).resolve()
    if not (folder / "data" / "clothing").is_dir():
        pytest.skip(f"no real data: {folder} holds no data/clothing (PLEAT_TEST_DATA names another folder)")
    return folder


@pytest.fixture(scope="session")
def clothing(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which the real clothing batch is ingested and validated."""
    from pipeline_steps import ingest, validate

    root = tmp_path_factory.mktemp("clothing")
    (root / "data" / "raw").mkdir(parents=True)
    (root / "data" / "raw" / "clothing").symlink_to(real_data / "data" / "clothing")
    shutil.copytree(REPOSITORY / "data" / "expectations", root / "data" / "expectations")
    settings = load_params({"experiment.batches": ["clothing"]})
    ingest.run(settings, "clothing", root)
    validate.run(settings, root)
    return root


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which the pipeline has run once on the sample, without a network."""
    from workspace import check, copy_checkout, use_quick

    folder = copy_checkout(tmp_path_factory.mktemp("finished"))
    use_quick(folder)
    output = check(folder, "dvc", "repro", HF_HUB_OFFLINE="1")
    (folder / "first_output.txt").write_text(output)
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The last digits depend on the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def refitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which a small CNN for drawn images is refitted and packaged; tests only read it."""
    from refit_workspace import drawn, make, settings

    from pipeline_steps import refit

    root = make(tmp_path_factory.mktemp("refitted"), settings(), drawn())
    refit.run(settings(), root)
    return root


@pytest.fixture(scope="session")
def refitted_on_photos(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a frozen MobileNetV2 on real photos."""
    from refit_workspace import frozen, make, photos, settings

    from pipeline_steps import refit

    params = settings(frozen(real_data))
    root = make(tmp_path_factory.mktemp("refitted_on_photos"), params, photos(real_data))
    refit.run(params, root)
    return root


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Served]":
    """Airflow and MLflow as `make airflow` starts them, in a project with quick settings."""
    from airflow_served import served_in

    with served_in(tmp_path_factory.mktemp("served")) as running:
        yield running
