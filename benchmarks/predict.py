"""Batch scoring: `pleat predict` on real JPEG files with a frozen backbone as champion, from start to end.

Run with `python benchmarks/predict.py`; takes about two minutes. The champion's head is not trained, which costs
the same. With mirrored views a model sees each image twice, as it was trained, so it takes nearly twice as long.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from clone import users_environment
from measure import REPOSITORY, alternate, data_folder, on_this_machine, verdict

MODEL, N_CLASSES = "mobilenetv2_100", 17
TARGET = 150.0
PREDICT = [sys.executable, "-c", "from pipeline_steps.cli import main; main()", "predict"]
VIEWS = {"one view": False, "both views": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000, help="how many images (default 1000)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each model is measured (default 5)")
    arguments = parser.parse_args()
    data = data_folder()
    title = f"Predict: frozen {MODEL} on {arguments.images:,} images of the clothing set, no GPU"
    with on_this_machine(title), tempfile.TemporaryDirectory(prefix="pleat-benchmark-") as folder:
        files = sorted((data / "data" / "clothing" / "images").iterdir())[: arguments.images]
        images = Path(folder) / "images"
        images.mkdir()
        for file in files:
            (images / file.name).symlink_to(file)
        champions = {name: Champion(Path(folder) / name, data, mirror) for name, mirror in VIEWS.items()}
        for champion in champions.values():
            champion.rate(images)  # files and code are in the system's memory from now on
            champion.steady.clear()
        found = alternate({name: lambda it=it: it.rate(images) for name, it in champions.items()}, arguments.rounds)
        report(found, champions, arguments.images)


@dataclass
class Champion:
    """A workspace whose registry has a champion; `steady` collects what each run printed of its rate."""

    root: Path
    data: Path
    mirror: bool
    steady: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root.mkdir()
        (self.root / "params.yaml").write_bytes((REPOSITORY / "params.yaml").read_bytes())
        self.env = users_environment(self.root) | {"MLFLOW_TRACKING_URI": f"sqlite:///{self.root}/mlflow.db"}
        build = [sys.executable, "-c", "import predict, sys; predict.build(*sys.argv[1:])"]
        arguments = [str(self.root), str(self.data), str(int(self.mirror))]
        path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "benchmarks")])
        subprocess.run([*build, *arguments], check=True, env={**self.env, "PYTHONPATH": path}, capture_output=True)

    def rate(self, images: Path) -> float:
        """Images a second from the start of the command to its end."""
        started = time.perf_counter()
        said = run(["images", "--out", "scores.parquet"], images.parent, self.root, self.env)
        seconds = time.perf_counter() - started
        n, steady = re.findall(r"predict: ([\d,]+) images.* ([\d,]+) images/s once the model was loaded", said)[0]
        self.steady.append(float(steady.replace(",", "")))
        return int(n.replace(",", "")) / seconds


def run(arguments: list[str], images: Path, root: Path, env: Mapping[str, str]) -> str:
    """Runs `pleat predict` in a workspace; ends the script with what it said if it fails."""
    command = [*PREDICT, str(images / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"`pleat predict` failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(root: str, data: str, mirror: str) -> None:
    """Packages the backbone with a head and makes it champion; in its own process, since MLflow keeps its store."""
    import mlflow
    import torch

    from pipeline_steps import package, params
    from pipeline_steps.registry import Registry
    from pipeline_steps.targets import Target
    from pipeline_steps.vision.backbones import load_backbone
    from pipeline_steps.vision.networks import Head

    backbone, preprocessing = load_backbone(MODEL, Path(data) / "weights" / f"{MODEL}.safetensors")
    whole = torch.nn.Sequential(backbone, Head(backbone.network.num_features, N_CLASSES, hidden=0, dropout=0.0))
    settings = params.load(Path(root) / "params.yaml")
    about = {
        "preprocessing": asdict(preprocessing),
        "max_pixels": settings.ingest.max_pixels,
    }
    folder = Path(root) / "package"
    folder.mkdir()
    example = next((Path(data) / "data" / "clothing" / "images").iterdir()).read_bytes()
    label = Target("label", False, ["label"], [f"class {number}" for number in range(N_CLASSES)])
    package.write(folder, package.Answering(whole, [label], bool(int(mirror))), preprocessing.crop, about, example)
    registry = Registry(settings.promotion.model)
    experiment = mlflow.create_experiment("pleat", (Path(root) / "mlruns").as_uri())
    run_id = registry.client.create_run(experiment).info.run_id
    version = registry.register(folder, package.digest(folder), run_id, {})
    registry.record("promoted", version, "", version, ["for the benchmark"], {})


def report(found: Mapping[str, list[float]], champions: Mapping[str, Champion], n_images: int) -> None:
    rounds = len(next(iter(found.values())))
    print(f"\nMedian of {rounds} alternating rounds, {n_images:,} images each:")
    for name, rates in found.items():
        steady = statistics.median(champions[name].steady)
        print(
            f"  {name:10}  {statistics.median(rates):6,.1f} images/s end to end (rounds {min(rates):,.0f} to "
            f"{max(rates):,.0f}); {steady:,.0f} images/s once the model was loaded"
        )
    print("\nTarget on 2 cores, end to end with start-up:")
    for name, rates in found.items():
        print(verdict(f"images a second, {name}", statistics.median(rates), ">=", TARGET))


if __name__ == "__main__":
    main()
