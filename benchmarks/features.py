"""Frozen features on a CPU: Pleat's `extract` (decode, resize, both views) against plain torch (forward only).

Run with `python benchmarks/features.py`; takes about two minutes. A view is an image or its mirrored copy, so an image
counts twice on both sides. Both sides use the same images and weights; torch gets its images decoded and resized.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from clone import users_environment, watch
from measure import REPOSITORY, alternate, data_folder, on_this_machine, print_rates, ratio, verdict

MODEL = "mobilenetv2_100"
BATCH = 32
TARGET = 3.0
TORCH, PLEAT = "torch, forward only", "Pleat, bytes to features"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256, help="how many images (default 256)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side is measured (default 5)")
    parser.add_argument("--only", choices=["torch", "pleat"], help="run one side once, for its memory")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
    data = data_folder()
    if arguments.only:
        bench = Bench(data, arguments.images)
        bench.torch_features() if arguments.only == "torch" else bench.pleat_features()
        return
    with on_this_machine(f"Features: {MODEL} on {arguments.images} images of the clothing set, no GPU"):
        measure(Bench(data, arguments.images), arguments.rounds)
        print("\nPeak memory of a process that does only this:")
        for side, title in (("torch", TORCH), ("pleat", PLEAT)):
            command = [sys.executable, __file__, "--only", side, "--images", str(arguments.images)]
            env = {**users_environment(REPOSITORY), "PLEAT_TEST_DATA": str(data)}
            print(f"  {title:24} {watch(command, REPOSITORY, env).peak_bytes / 2**30:.2f} GiB")


@dataclass(frozen=True)
class Timed:
    """Features float32 (n, 2, n_features) with the seconds they took."""

    features: np.ndarray
    seconds: float
    startup_s: float = 0.0


class Bench:
    """The backbone and the first images of the clothing set, encoded."""

    def __init__(self, data: Path, n_images: int) -> None:
        import torch

        from pipeline_steps.serving.upright import is_plain_jpeg, open_image
        from pipeline_steps.vision import backbones

        self.torch_threads = torch.get_num_threads()
        self.backbone, self.preprocessing = backbones.load_backbone(MODEL, data / "weights" / f"{MODEL}.safetensors")
        files = sorted((data / "data" / "clothing" / "images").iterdir())[:n_images]
        self.images = []
        for encoded in (file.read_bytes() for file in files):
            with open_image(encoded) as image:
                self.images.append((encoded, is_plain_jpeg(image)))

    def pixels(self) -> np.ndarray:
        """Both views of every image as extract makes them: uint8 (n, 2, 3, crop, crop)."""
        plain = np.stack([self.preprocessing(image).numpy() for image in self.images])
        return np.stack([plain, plain[..., ::-1]], axis=1)

    def torch_features(self, pixels: np.ndarray | None = None) -> Timed:
        """What a plain script does: eager float32 forward, batches of 32 views, all threads."""
        import torch

        pixels = self.pixels() if pixels is None else pixels
        torch.set_num_threads(self.torch_threads)  # extract has set it to one
        views = torch.from_numpy(pixels).flatten(0, 1)
        started = time.perf_counter()
        with torch.inference_mode():
            features = torch.cat([self.backbone(part) for part in torch.split(views, BATCH)])
        seconds = time.perf_counter() - started
        return Timed(features.reshape(len(pixels), 2, -1).numpy(), seconds)

    def pleat_features(self) -> Timed:
        """What `prepare` does; its start-up (export to ONNX, session) lasts until the first image is done."""
        from pipeline_steps.vision.backbones import extract

        started = time.perf_counter()
        results = extract(self.backbone, self.preprocessing, self.images)
        first = next(results)
        ready = time.perf_counter()
        features = np.stack([first, *results])
        return Timed(features, time.perf_counter() - ready, ready - started)

    def runners(self) -> dict[str, Callable[[np.ndarray], None]]:
        """Ways to run the same ONNX file over views uint8 (2 n, 3, crop, crop) on all cores."""
        import onnxruntime

        from pipeline_steps.vision import backbones

        cores = os.cpu_count() or 1
        encoded = backbones.onnx_bytes(self.backbone, self.preprocessing.crop)
        a_core = backbones.cpu_runner(self.backbone, self.preprocessing.crop)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cores
        over_all = onnxruntime.InferenceSession(encoded, options, providers=["CPUExecutionProvider"])

        def one_core_each(views: np.ndarray) -> None:
            with ThreadPoolExecutor(cores) as pool:
                list(pool.map(a_core, np.split(views, len(views) // 2)))

        def together(size: int) -> Callable[[np.ndarray], None]:
            def run(views: np.ndarray) -> None:
                for start in range(0, len(views), size):
                    over_all.run(None, {"pixels": views[start : start + size]})

            return run

        return {
            "ONNX, each core its own 2 views": one_core_each,
            "ONNX, all cores on the same 2 views": together(2),
            f"ONNX, all cores on the same {BATCH} views": together(BATCH),
        }


def measure(bench: Bench, rounds: int) -> None:
    """Prints rates, ratios and how far the features of both sides differ."""
    pixels = bench.pixels()
    views = np.ascontiguousarray(pixels.reshape(-1, *pixels.shape[2:]))
    plain, pleat = bench.torch_features(pixels), bench.pleat_features()  # warm both up
    startups = []

    def torch_rate() -> float:
        return len(views) / bench.torch_features(pixels).seconds

    def pleat_rate() -> float:
        timed = bench.pleat_features()
        startups.append(timed.startup_s)
        return 2 * (len(bench.images) - 1) / timed.seconds

    def forward_rate(run: Callable[[np.ndarray], None]) -> float:
        started = time.perf_counter()
        run(views)
        return len(views) / (time.perf_counter() - started)

    forward = {name: lambda run=run: forward_rate(run) for name, run in bench.runners().items()}
    found = alternate({TORCH: torch_rate, PLEAT: pleat_rate, **forward}, rounds)
    print(f"\nMedian of {rounds} alternating rounds, {len(views):,} views each:")
    print_rates(found, "views/s", TORCH)
    print(f"  Pleat's start-up is not in its rate: {statistics.median(startups):.1f} s once a batch of data")

    apart = np.abs(plain.features - pleat.features)
    print(
        f"\nFeatures of both sides differ by at most {apart.max():.2g} (mean {apart.mean():.2g}; "
        f"the features' standard deviation is {plain.features.std():.2g})"
    )
    print("\nTarget on 2 cores:")
    print(verdict("views a second, Pleat to plain torch", ratio(found, PLEAT, TORCH), ">=", TARGET))


if __name__ == "__main__":
    main()
