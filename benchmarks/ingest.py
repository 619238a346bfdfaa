"""Ingestion of the real clothing set: the stage `ingest` against a plain single-threaded Pillow loop.

Run with `python benchmarks/ingest.py`; takes about two minutes. The loop does what the manifest needs and no more:
read, open, turn upright, convert to RGB, sha256, perceptual hash. The stage also checks, packs and writes.
"""

import argparse
import hashlib
import io
import os
import shutil
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

from clone import Workspace, users_environment
from measure import REPOSITORY, alternate, data_folder, on_this_machine, print_rates, verdict

BATCH = "clothing"
TARGET = 500
STAGE, LOOP = "stage ingest", "plain Pillow loop"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is measured (default 3)")
    rounds = parser.parse_args().rounds
    data = data_folder()
    with on_this_machine("Ingestion: the clothing set"), tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "pleat"
        (root / "data" / "raw").mkdir(parents=True)
        (root / "data" / "raw" / BATCH).symlink_to(data / "data" / BATCH)
        measure(root, rounds)
        measure_command(root, data)


def measure(root: Path, rounds: int) -> None:
    """Prints images a second of both sides, their ratio, and whether they found the same."""
    import pandas as pd

    from pipeline_steps import ingest, params

    settings = params.load(REPOSITORY / "recipes" / "clothing.yaml")
    found: list[tuple[str, str]] = []

    def stage_seconds() -> float:
        started = time.perf_counter()
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            ingest.run(settings, BATCH, root)
        return time.perf_counter() - started

    stage_seconds()  # reads every file once, so that both sides find them in memory
    manifest = pd.read_parquet(root / "data" / "ingest" / BATCH / "manifest.parquet")
    files = [root / "data" / "raw" / BATCH / path for path in manifest["source_path"]]

    def loop_seconds() -> float:
        started = time.perf_counter()
        found[:] = [plain(file) for file in files]
        return time.perf_counter() - started

    rates = alternate({LOOP: lambda: len(files) / loop_seconds(), STAGE: lambda: len(files) / stage_seconds()}, rounds)
    print(f"\nMedian of {rounds} alternating rounds, {len(files):,} images each:")
    print_rates(rates, "images/s", LOOP)
    same = found == list(zip(manifest["sample_id"], manifest["phash"], strict=True))
    print(f"  both found {'the same' if same else 'DIFFERENT'} sha256 and perceptual hashes")
    print("\nTarget on 2 cores:")
    print(verdict(STAGE, statistics.median(rates[STAGE]), ">=", TARGET, " images/s"))


def plain(file: Path) -> tuple[str, str]:
    """sha256 and perceptual hash of one image, the obvious way."""
    import imagehash
    from PIL import Image, ImageOps

    encoded = file.read_bytes()
    with Image.open(io.BytesIO(encoded)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    return hashlib.sha256(encoded).hexdigest(), str(imagehash.phash(upright))


def measure_command(root: Path, data: Path) -> None:
    """Prints the time and memory of the command that dvc.yaml runs, the interpreter's start included."""
    shutil.copytree(REPOSITORY / "recipes", root / "recipes")
    workspace = Workspace(root, users_environment(root, code=REPOSITORY))
    weights = data / "weights" / "mobilenetv2_100.safetensors"
    workspace.run("pleat", "use", "clothing", "--set", f"models.mobilenetv2_100.weights={weights}")
    watched = workspace.run("pleat", "ingest", BATCH)
    print(f"\n`pleat ingest {BATCH}` as a command: {watched.seconds:.1f} s, peak {watched.peak_bytes / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
