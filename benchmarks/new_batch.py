"""What new data costs: 500 images through the inbox after 5,000, against ingest and prepare for all of those.

Run with `python benchmarks/new_batch.py`; takes about three minutes. Both parts are the clothing set: 500 of its
labelled images, drawn by chance, come later than the rest (4,898, so that the 5,000 are rather fewer).
"""

import csv
import random
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from clone import Watched, Workspace, fresh_clone, print_stages, stages
from measure import data_folder, on_this_machine, verdict

MODEL, N_LATER = "mobilenetv2_100", 500
COUNTED = ("ingest", "prepare")
TARGET = 0.2


def main() -> None:
    data = data_folder()
    with (
        on_this_machine(f"New data: {N_LATER} images after all others of the clothing set"),
        tempfile.TemporaryDirectory(prefix="pleat-benchmark-") as folder,
        fresh_clone() as clone,
    ):
        measure(clone, data, Path(folder))


def measure(clone: Workspace, data: Path, folder: Path) -> None:
    """Runs the stages up to `prepare` on the first part, sends the second through the inbox, and runs them again."""
    earlier, later = parts(data / "data" / "clothing")
    write(folder / "earlier", data / "data" / "clothing", earlier)
    clone.run("pleat", "data", "add", str(folder / "earlier"), "--name", "earlier")
    weights = data / "weights" / f"{MODEL}.safetensors"
    settings = [f"models.{MODEL}.weights={weights}", "experiment.batches=[earlier]", "inbox.settle_s=0"]
    clone.run("pleat", "use", "clothing", *(part for setting in settings for part in ("--set", setting)))
    first = clone.run("dvc", "repro", "prepare")
    print(f"\n`dvc repro prepare`, {len(earlier):,} images: {first.seconds:.1f} s; of these")
    print_stages(first)

    write(clone.root / "data" / "inbox" / "later", data / "data" / "clothing", later)
    looked = clone.run("pleat", "inbox")
    if not any("is now the batch" in line for _, line in looked.lines):
        raise SystemExit("\n".join(line for _, line in looked.lines))
    print(f"\n`pleat inbox`, {len(later):,} images checked and added: {looked.seconds:.1f} s")
    second = clone.run("dvc", "repro", "prepare")
    print(f"`dvc repro prepare` after it: {second.seconds:.1f} s; of these")
    print_stages(second)
    print("\nTarget on 2 cores:")
    print(verdict("ingest and prepare of the new, part of those of the rest", cost(second) / cost(first), "<=", TARGET))
    print(f"  with `pleat inbox` and all stages: {(looked.seconds + second.seconds) / first.seconds:.2f}")


def parts(source: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows of images.csv whose image is there: those that come first, those that come later."""
    with (source / "images.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (source / "images" / f"{row['image']}.jpg").is_file()]
    random.Random(0).shuffle(rows)
    return rows[N_LATER:], rows[:N_LATER]


def write(folder: Path, source: Path, rows: list[dict[str, str]]) -> None:
    """A data set of these rows and their images."""
    (folder / "images").mkdir(parents=True)
    for row in rows:
        shutil.copy(source / "images" / f"{row['image']}.jpg", folder / "images")
    with (folder / "images.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def cost(watched: Watched) -> float:
    """Seconds of the stages that the target is about, as far as they ran."""
    found: Iterable[tuple[str, tuple[str, float]]] = stages(watched).items()
    return sum(seconds for name, (what, seconds) in found if what == "ran" and name.split("@")[0] in COUNTED)


if __name__ == "__main__":
    main()
