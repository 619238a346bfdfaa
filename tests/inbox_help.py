"""Deliveries of drawn images, and what a project looks like after them."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from conftest import draw, encode, write_params
from PIL import Image, ImageEnhance

from pipeline_steps import inbox, params
from pipeline_steps.params import Params

LABELS = ("Hat", "Shoes", "Shirt")
N_TRAINING = 45
SETTINGS = {"experiment.batches": ["old"], "inbox.settle_s": 0}
Edit = Callable[[Image.Image], Image.Image]


def images(first: int, n: int, edit: Edit = lambda image: image) -> dict[str, bytes]:
    """`n` labelled images as class folders: path to bytes."""
    return {f"{LABELS[seed % len(LABELS)]}/{seed}.jpg": encode(edit(draw(seed))) for seed in range(first, first + n)}


def dark(image: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(0.15)


def put(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def dvc(root: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def batches(root: Path) -> list[str]:
    return params.load(root / "params.yaml").experiment.batches


def settings(root: Path) -> Params:
    return params.load(root / "params.yaml")


def take(root: Path) -> list[inbox.Taken]:
    return inbox.take(settings(root), root)


def change(root: Path, overrides: Mapping[str, object]) -> None:
    """Writes params.yaml anew with these values, its batches kept."""
    write_params(root, {**SETTINGS, "experiment.batches": batches(root), **overrides})


def summary(root: Path) -> dict[str, object]:
    """What must be there once, however often it was tried."""
    return {
        "raw": sorted(path.name for path in (root / "data" / "raw").iterdir()),
        "batches": batches(root),
        "tags": git(root, "tag").split(),
        "commits": git(root, "log", "--format=%s").splitlines(),
        "changed": git(root, "status", "--porcelain"),
        "inbox": sorted(path.name for path in (root / "data" / "inbox").iterdir()),
        "remote": sorted(path.name for path in (root / "remote").rglob("*") if path.is_file()),
    }
