"""Cross-validation with a frozen backbone: Pleat computes features once, a plain script a forward pass each epoch.

Run with `python benchmarks/frozen_cv.py`; takes about six minutes. Both sides train the same shape of head for the same
number of epochs on the same images, folds and weights, each in a process of its own, and the clock starts after the
imports. Pleat's time holds the stages `prepare` (decoding, both views, the export to ONNX) and `train` of every fold.
The plain side gets its images decoded, resized and in memory, and its backbone loaded; each epoch it forwards one view
of every training image, drawn anew, and one of every image of the scored fold.
"""

import argparse
import csv
import ctypes
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clone import Workspace, users_environment
from measure import REPOSITORY, alternate, data_folder, on_this_machine, verdict
from new_batch import write

if TYPE_CHECKING:
    pass

RECIPE, MODEL, BATCH, TARGET_NAME = "clothing_top10", "mobilenetv2_100", "clothing", "label"
FOLDS, EPOCHS = 5, 10
BATCH_SIZE, LEARNING_RATE = 32, 0.002  # few images, so smaller steps than the recipe's
TARGET, SCORES_APART = 20.0, 0.03
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000, help="drawn from the clothing set (default 1000)")
    parser.add_argument("--rounds", type=int, default=1, help="how often each side is measured (default 1)")
    parser.add_argument("--side", choices=["pleat", "plain"], help="run one side once in this folder")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
    if arguments.side:
        print(json.dumps(pleat_side() if arguments.side == "pleat" else plain_side()))
        return
    data = data_folder()
    title = f"Frozen cross-validation: {MODEL}, {FOLDS} folds, {EPOCHS} epochs, no GPU"
    with on_this_machine(title), tempfile.TemporaryDirectory(prefix="pleat-benchmark-") as folder:
        root = Path(folder) / "pleat"
        measure(workspace(root, data, arguments.images), arguments.rounds)


@dataclass(frozen=True)
class Side:
    """What one side took and scored.

    Attributes:
        seconds: of each of its parts.
        f1_weighted: of each fold.
        forwarded: images, each view counted.
        n_images: of all folds together.
    """

    seconds: dict[str, float]
    f1_weighted: list[float]
    forwarded: int
    n_images: int


def workspace(root: Path, data: Path, n_images: int) -> Workspace:
    """A folder in which the stages before `prepare` have run on a random part of the clothing set."""
    source = data / "data" / "clothing"
    with (source / "images.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (source / "images" / f"{row['image']}.jpg").is_file()]
    write(root / "data" / "raw" / BATCH, source, random.Random(0).sample(rows, n_images))
    shutil.copytree(REPOSITORY / "recipes", root / "recipes")
    shutil.copytree(REPOSITORY / "data" / "expectations", root / "data" / "expectations")
    made = Workspace(root, users_environment(root, code=REPOSITORY))
    settings = {
        f"models.{MODEL}.weights": data / "weights" / f"{MODEL}.safetensors",
        "experiment.folds": FOLDS,
        "split.holdout.fraction": 0,
        f"training.{MODEL}.max_epochs": EPOCHS,
        f"training.{MODEL}.batch_size": BATCH_SIZE,
        f"training.{MODEL}.learning_rate": LEARNING_RATE,
    }
    made.run(
        "pleat", "use", RECIPE, *(part for name, value in settings.items() for part in ("--set", f"{name}={value}"))
    )
    for stage in (["ingest", BATCH], ["validate"], ["split"]):
        made.run("pleat", *stage)
    return made


def pleat_side() -> dict[str, object]:
    """The stages `prepare` and `train`, as dvc.yaml runs them."""
    import pandas as pd
    from sklearn.metrics import f1_score

    from pipeline_steps import params, prepare, train
    from pipeline_steps.vision import backbones  # noqa: F401

    settings = params.load()
    started = time.perf_counter()
    prepare.run(settings, MODEL, BATCH)
    prepared = time.perf_counter()
    for fold in settings.experiment.folds:
        train.run(settings, MODEL, fold)
    trained = time.perf_counter()
    scores, n_images = [], 0
    for fold in settings.experiment.folds:
        answers = pd.read_parquet(f"data/train/{MODEL}/fold_{fold}/predictions/{TARGET_NAME}.parquet")
        columns = answers.filter(like="p:")
        best = columns.idxmax(axis=1).str.removeprefix("p:")
        scores.append(f1_score(answers["label"], best, average="weighted"))
        n_images += len(answers)
    n_forwarded = 2 * len(json.loads(Path(f"data/prepare/{MODEL}/{BATCH}/sample_ids.json").read_text()))
    seconds = {"prepare": prepared - started, "train": trained - prepared}
    return vars(Side(seconds, scores, n_forwarded, n_images))


def plain_side() -> dict[str, object]:
    """The obvious loop in torch, as quick as a few lines make it: channels_last, and a malloc that keeps its memory."""
    with suppress(OSError, AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    import numpy as np
    import pandas as pd
    import torch
    from sklearn.metrics import f1_score

    from pipeline_steps import params
    from pipeline_steps.packed import read_images
    from pipeline_steps.serving.upright import is_plain_jpeg, open_image
    from pipeline_steps.vision.backbones import load_backbone

    settings = params.load().models[MODEL]
    backbone, preprocessing = load_backbone(MODEL, Path(settings.weights or ""))
    backbone = backbone.to(memory_format=torch.channels_last)
    samples = pd.read_parquet("data/split/folds.parquet")
    encoded = read_images(Path("data/ingest") / BATCH / "images.arrow", list(samples["sample_id"]))
    pixels = []
    for image in (encoded[name] for name in samples["sample_id"]):
        with open_image(image) as opened:
            pixels.append(preprocessing((image, is_plain_jpeg(opened))))
    images = torch.stack(pixels).permute(0, 2, 3, 1).contiguous()  # as channels_last lies in memory
    codes = torch.tensor(pd.factorize(samples[TARGET_NAME], sort=True)[0])
    folds = torch.tensor(samples["fold"].to_numpy())
    n_classes, forwarded, scores = int(codes.max()) + 1, 0, []

    def features(rows: torch.Tensor, mirrored: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal forwarded
        forwarded += len(rows)
        part = images[rows].permute(0, 3, 1, 2)
        if mirrored is not None:
            part = torch.where(mirrored[:, None, None, None], part.flip(-1), part)
        with torch.no_grad():
            return backbone(part.contiguous(memory_format=torch.channels_last))

    features(torch.arange(BATCH_SIZE))  # warms it up
    forwarded = 0
    torch.manual_seed(0)
    started = time.perf_counter()
    for fold in range(FOLDS):
        learn, scored = torch.where(folds != fold)[0], torch.where(folds == fold)[0]
        head = torch.nn.Sequential(
            torch.nn.BatchNorm1d(1280), torch.nn.Dropout(0.5), torch.nn.Linear(1280, 256), torch.nn.GELU(),
            torch.nn.Dropout(0.5), torch.nn.Linear(256, n_classes),
        )  # fmt: skip
        optimizer = torch.optim.AdamW(head.parameters(), LEARNING_RATE, weight_decay=0.05)
        n_steps = EPOCHS * (len(learn) // BATCH_SIZE)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, n_steps, pct_start=0.2)
        loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        for _ in range(EPOCHS):
            head.train()
            for part in learn[torch.randperm(len(learn))][: n_steps // EPOCHS * BATCH_SIZE].split(BATCH_SIZE):
                optimizer.zero_grad()
                loss(head(features(part, torch.rand(len(part)) < 0.5)), codes[part]).backward()
                optimizer.step()
                cycle.step()
            head.eval()
            with torch.no_grad():
                best = np.concatenate([head(features(part)).argmax(1).numpy() for part in scored.split(BATCH_SIZE)])
            score = f1_score(codes[scored], best, average="weighted")
        scores.append(score)
        print(f"plain: fold {fold} after {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return vars(Side({"all": time.perf_counter() - started}, scores, forwarded, len(samples)))


def measure(made: Workspace, rounds: int) -> None:
    """Runs both sides, the plain one between two of Pleat's, and prints what they took and scored."""
    sides: dict[str, list[Side]] = {"pleat": [], "plain": []}

    def seconds(side: str) -> float:
        # Not `watch`, which reads the memory of the process all the time and so holds it up.
        command = [sys.executable, __file__, "--side", side]
        done = subprocess.run(command, cwd=made.root, env=made.env, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"The side {side} failed with status {done.returncode}.")
        sides[side].append(Side(**json.loads(done.stdout.splitlines()[-1])))
        return sum(sides[side][-1].seconds.values())

    found = alternate({"pleat": lambda: seconds("pleat"), "plain": lambda: seconds("plain")}, rounds)
    found["pleat"].append(seconds("pleat"))
    pleat, plain = statistics.median(found["pleat"]), statistics.median(found["plain"])
    print(f"\n{sides['plain'][0].n_images:,} images in {FOLDS} folds, {EPOCHS} epochs:")
    for name, each in sides.items():
        took = ", ".join(f"{sum(side.seconds.values()):.1f} s" for side in each)
        parts = " + ".join(f"{part} {taken:.1f} s" for part, taken in each[-1].seconds.items())
        score = statistics.mean(each[-1].f1_weighted)
        spread = statistics.stdev(each[-1].f1_weighted)
        print(
            f"  {name:6} {took} ({parts}); {each[-1].forwarded:,} views through the backbone; "
            f"weighted F1 {score:.3f} ± {spread:.3f}"
        )
    print(f"  plain: {sides['plain'][-1].forwarded / plain:,.0f} views/s")
    apart = statistics.mean(sides["plain"][-1].f1_weighted) - statistics.mean(sides["pleat"][-1].f1_weighted)
    print("\nTargets on 2 cores:")
    print(verdict("the plain way takes, times Pleat's", plain / pleat, ">=", TARGET))
    print(verdict("weighted F1, the plain way's lead", apart, "<=", SCORES_APART))


if __name__ == "__main__":
    main()
