"""Training on a GPU: the engine from real images against the same steps on ready tensors, and against timm's parts.

Run with `python benchmarks/engine_gpu.py`; takes about 20 minutes. Where CUDA shows no GPU, it says so and ends.

timm's package comes without its train.py, so the loop of `Bench.timm` stands for it: written here, of timm's own parts
(dataset, loader with prefetcher, network, optimizer, learning rate) in the order of that script.
"""

import argparse
import csv
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from measure import Rounds, alternate, data_folder, on_this_machine, print_rates, ratio, verdict
from torch import Tensor

from pipeline_steps.vision.inputs import Arrays, Pixels

NETWORKS = ("convnext_tiny", "resnet50")
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05
READY, RESIDENT, STREAMED, TIMM = (
    "engine, ready tensors",
    "engine, device memory",
    "engine, copied ahead",
    "timm's parts",
)
SHARE_OF_READY, TIMES_TIMM = 0.95, 1.2
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is measured (default 3)")
    parser.add_argument("--batches", type=int, default=160, help="batches in an epoch (default 160)")
    parser.add_argument("--batch-size", type=int, default=128, help="images in a batch (default 128)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("Skipped: CUDA shows no GPU, and training on one is what this measures.")
        return
    data, device = data_folder(), torch.device("cuda", 0)
    title = f"Engine: training at 224 pixels on {torch.cuda.get_device_name(device)}"
    with on_this_machine(title), tempfile.TemporaryDirectory() as folder:
        prepared = prepare(data / "data" / "clothing", Path(folder), size=224)
        bench = Bench(prepared, device, arguments.batch_size, arguments.batches, os.cpu_count() or 1)
        found = {network: measure(bench, network, arguments.rounds, (False, True)) for network in NETWORKS}
        print("\nTargets:")
        for network, rates in found.items():
            print_verdicts(network, rates, (False, True))


@dataclass(frozen=True)
class Prepared:
    """The clothing set as either side reads it.

    Attributes:
        values: uint8 (n, 3, size, size), a memory map of inputs.npy, as the stage `prepare` writes it.
        codes: int64 (n, 1).
        images: a folder of images in one folder a class, as timm reads them.
    """

    values: np.ndarray
    codes: Tensor
    n_classes: int
    images: Path


def prepare(clothing: Path, folder: Path, size: int) -> Prepared:
    """Decodes and resizes every image once, as the stage `prepare` does it, and links the files for timm."""
    from pipeline_steps.serving.images import decode, resize_crop
    from pipeline_steps.serving.upright import is_plain_jpeg, open_image

    def pixels(row: tuple[Path, str]) -> np.ndarray:
        encoded = row[0].read_bytes()
        with open_image(encoded) as image:
            plain = is_plain_jpeg(image)
        return resize_crop(decode(encoded, plain), size, size).numpy()

    with (clothing / "images.csv").open() as file:
        listed = [(clothing / "images" / f"{row['image']}.jpg", row["label"]) for row in csv.DictReader(file)]
    rows = [(path, label) for path, label in listed if path.is_file() and path.stat().st_size]
    classes = sorted({label for _, label in rows})
    for path, label in rows:
        place = folder / "images" / label / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
    started, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # parallel over images instead
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        np.save(folder / "inputs.npy", np.stack(list(pool.map(pixels, rows))))
    torch.set_num_threads(threads)
    print(f"{len(rows):,} images decoded and resized once, as the engine's side needs them: "
          f"{time.perf_counter() - started:.1f} s")  # fmt: skip
    codes = torch.tensor([[classes.index(label)] for _, label in rows])
    return Prepared(np.load(folder / "inputs.npy", mmap_mode="r"), codes, len(classes), folder / "images")


def clocked(
    batches: Iterator[T], n_skipped: int, n_images: int, device: torch.device, rates: list[float]
) -> Iterator[T]:
    """Hands the batches on; then adds to `rates` the images/s from batch `n_skipped` on to the end of the last step.

    The clock starts and stops when the device has done what it was given; in between, nothing waits for it.
    """
    number, started = 0, 0.0
    for number, batch in enumerate(batches):
        if number == n_skipped:
            torch.get_device_module(device).synchronize(device)
            started = time.perf_counter()
        yield batch
    torch.get_device_module(device).synchronize(device)
    rates.append((number + 1 - n_skipped) * n_images / (time.perf_counter() - started))


@dataclass(frozen=True)
class Clocked(Pixels):
    """Pixels that measure how fast they are trained on, epoch by epoch."""

    rates: list[float] = field(default_factory=list)

    def batches(self, rows: Tensor, mirrored: Tensor, batch_size: int) -> Iterator[Tensor]:
        """As `Pixels`, with a clock."""
        batches = super().batches(rows, mirrored, batch_size)
        yield from clocked(batches, n_skipped(len(rows) // batch_size), batch_size, self.device, self.rates)


@dataclass(frozen=True)
class Ready(Clocked):
    """One batch on the device, which is every batch."""

    def batch(self, rows: Tensor, mirrored: Tensor) -> Tensor:  # noqa: ARG002
        """The ready one."""
        return self.values[: len(rows)]


def n_skipped(n_batches: int) -> int:
    """Batches before the clock starts: until then queues fill and cuDNN chooses."""
    return n_batches // 8


@dataclass(frozen=True)
class Bench:
    """How both sides train: for two epochs, of which the second is measured."""

    prepared: Prepared
    device: torch.device
    batch_size: int
    n_batches: int
    n_workers: int

    def engine(self, network: str, inputs: str, compiled: bool) -> float:
        """Images/s of `engine.fit` as the stage `train` calls it, from one of READY, RESIDENT and STREAMED."""
        from pipeline_steps.vision.timm_networks import load_network

        values = Arrays((self.prepared.values,), np.zeros(self.n_prepared, np.int64), np.arange(self.n_prepared))
        torch.compiler.reset()
        torch.manual_seed(0)
        size = values.shape[-1]
        built = load_network(network, None, False, size, "pooled", self.prepared.n_classes, hidden=0, dropout=0.0)
        built = built.to(self.device).to(memory_format=torch.channels_last)
        if inputs == READY:
            chosen = Ready(values[torch.arange(self.batch_size)].to(self.device), self.device)
        else:
            chosen = Clocked(values.to(self.device) if inputs == RESIDENT else values, self.device)
        self._fit(built, chosen, compiled)
        return chosen.rates[-1]

    def _fit(self, network: torch.nn.Module, inputs: Pixels, compiled: bool) -> None:
        from pipeline_steps.vision.engine import Lesson, Schedule, fit
        from pipeline_steps.vision.losses import CrossEntropy
        from pipeline_steps.vision.objective import Objective, Output
        from pipeline_steps.vision.optimizer import OneCycle, Optimization

        schedule = Schedule(
            n_epochs=2,
            patience=2,
            batch_size=self.batch_size,
            optimization=Optimization("adamw", LEARNING_RATE, WEIGHT_DECAY, 1.0, OneCycle(), max_epochs=2),
            weight_average=0.0,
            mirror=True,
            seed=0,
            bfloat16=self.device.type == "cuda",
            compile=compiled,
        )
        objective = Objective((Output(False, self.prepared.n_classes),), CrossEntropy(0.0), "none")
        rows = torch.arange(self.n_batches * self.batch_size) % self.n_prepared
        codes = self.prepared.codes.to(self.device)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint.pt"
            lesson = Lesson(objective, inputs, codes, rows, None, schedule, checkpoint, "benchmark")
            fit(network, lesson, lambda _: None)

    @property
    def n_prepared(self) -> int:
        """Number of images."""
        return len(self.prepared.values)

    def timm(self, network: str, compiled: bool) -> float:
        """Images/s of a loop of timm's parts: decoding in worker processes, resize and flip only, as the engine."""
        import timm
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2

        torch.compiler.reset()
        torch.manual_seed(0)
        built = timm.create_model(network, num_classes=self.prepared.n_classes)
        model = built.to(self.device).to(memory_format=torch.channels_last).train()
        optimizer = create_optimizer_v2(model, opt="adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule, _ = create_scheduler_v2(
            optimizer, sched="cosine", num_epochs=2, step_on_epochs=False, updates_per_epoch=self.n_batches
        )
        loss, loader, rates = torch.nn.CrossEntropyLoss(), self.loader(), []
        model = torch.compile(model) if compiled else model
        updates = 0
        with torch.backends.cudnn.flags(benchmark=True):  # as in timm's train.py
            for _ in range(2):
                batches = clocked(iter(loader), n_skipped(len(loader)), self.batch_size, self.device, rates)
                for images, truth in batches:
                    images = images.contiguous(memory_format=torch.channels_last)
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                        value = loss(model(images), truth)
                    value.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    updates += 1
                    schedule.step_update(updates)
        return rates[-1]

    def loader(self) -> torch.utils.data.DataLoader:
        """timm's, with its prefetcher, over as many images as an epoch of the engine has."""
        from timm.data import create_dataset, create_loader, create_transform
        from torchvision.transforms import Compose, RandomHorizontalFlip

        dataset = create_dataset("", root=str(self.prepared.images))
        n_images = self.n_batches * self.batch_size
        dataset.reader.samples = (dataset.reader.samples * -(-n_images // self.n_prepared))[:n_images]
        size = self.prepared.values.shape[-1]
        loader = create_loader(
            dataset,
            (3, size, size),
            self.batch_size,
            is_training=True,
            num_workers=self.n_workers,
            pin_memory=self.device.type == "cuda",
            device=self.device,
        )
        # Its way to score, which keeps the aspect ratio as Pleat does; its training without augmentation squashes.
        plain = create_transform((3, size, size), use_prefetcher=True, interpolation="bilinear", crop_pct=1.0)
        resize, crop, *others = plain.transforms
        dataset.transform = Compose([resize, crop, RandomHorizontalFlip(), *others])
        return loader


def named(side: str, compiled: bool) -> str:
    """A side of the comparison, eager or compiled."""
    return f"{side}, compiled" if compiled else side


def measure(bench: Bench, network: str, rounds: int, compilations: tuple[bool, ...]) -> Rounds:
    """Prints and returns each side's images/s, which take turns."""
    sides: dict[str, Callable[[], float]] = {}
    for compiled in compilations:
        for inputs in (READY, RESIDENT, STREAMED):
            sides[named(inputs, compiled)] = partial(bench.engine, network, inputs, compiled)
        sides[named(TIMM, compiled)] = partial(bench.timm, network, compiled)
    found = alternate(sides, rounds)
    print(f"\n{network}, median of {rounds} alternating rounds, batches of {bench.batch_size}:")
    print_rates(found, "images/s", TIMM)
    return found


def print_verdicts(network: str, rates: Rounds, compilations: tuple[bool, ...]) -> None:
    """One line a target."""
    for compiled in compilations:
        ready, timm = named(READY, compiled), named(TIMM, compiled)
        for inputs in (RESIDENT, STREAMED):
            side = named(inputs, compiled)
            print(
                verdict(f"{network}: {side}, share of ready tensors", ratio(rates, side, ready), ">=", SHARE_OF_READY)
            )
        side = named(RESIDENT, compiled)
        print(verdict(f"{network}: {side}, times {timm}", ratio(rates, side, timm), ">=", TIMES_TIMM))


if __name__ == "__main__":
    main()
