"""The whole pipeline on the clothing set in a fresh clone: seconds by stage, peak memory, what runs again, scores.

Run with `python benchmarks/pipeline.py`; takes about five minutes.
"""

import json
from pathlib import Path
from typing import Any

from clone import Watched, Workspace, fresh_clone, print_stages, ran, stages
from measure import data_folder, on_this_machine, verdict

MODEL = "mobilenetv2_100"
NO_HOLDOUT = "split.holdout.fraction=0"
LEARNING_RATE = f"training.{MODEL}.learning_rate=0.002"
ALLOWED_AFTER_HEAD = ("train", "evaluate", "profile", "compare", "refit", "register")
AFTER_LEADERBOARD = ("refit", "register")
REPRO_SECONDS, AGAIN_SECONDS, GIB = 120, 3, 4
F1_NO_HOLDOUT, F1_HOLDOUT = 0.78, 0.77


def main() -> None:
    data = data_folder()
    with on_this_machine("Pipeline: the clothing set from raw images to the leaderboard"), fresh_clone() as clone:
        measure(clone, data)


def measure(clone: Workspace, data: Path) -> None:
    """Runs every experiment in one workspace and prints what each took and scored."""
    weights = data / "weights" / f"{MODEL}.safetensors"
    added = clone.run("pleat", "data", "add", str(data / "data" / "clothing"), "--name", "clothing")
    print(f"`pleat data add`: {added.seconds:.1f} s")

    def repro(*settings: str) -> Watched:
        sets = [f"models.{MODEL}.weights={weights}", *settings]
        clone.run("pleat", "use", "clothing", *(part for setting in sets for part in ("--set", setting)))
        return clone.run("dvc", "repro")

    first = repro(NO_HOLDOUT)
    scores = {"holdout off": read_scores(clone.root)}
    print(
        f"\n`dvc repro`, empty cache: {first.seconds:.1f} s, peak memory {first.peak_bytes / 2**30:.2f} GiB; of these"
    )
    print_stages(first)
    again = clone.run("dvc", "repro")
    print(f"\n`dvc repro`, nothing changed: {again.seconds:.1f} s; {stages_that_ran(again)}")
    head = repro(NO_HOLDOUT, LEARNING_RATE)
    scores["holdout off, learning rate 0.002"] = read_scores(clone.root)
    print(f"`dvc repro`, one parameter of the head changed: {head.seconds:.1f} s; {stages_that_ran(head)}")
    normal = repro()
    scores["normal holdout"] = read_scores(clone.root)
    print(f"`dvc repro`, normal holdout: {normal.seconds:.1f} s; {stages_that_ran(normal)}")
    grouped = repro(NO_HOLDOUT, "split.group_by=sender_id")
    scores["holdout off, senders kept whole"] = read_scores(clone.root)
    print(f"`dvc repro`, senders kept whole: {grouped.seconds:.1f} s; {stages_that_ran(grouped)}")

    print(f"\n{'weighted F1, out of fold':34} mean    std  pooled   macro  samples  classes")
    for name, score in scores.items():
        f1 = score["f1_weighted"]
        print(
            f"  {name:32} {f1['mean']:.3f}  {f1['std']:.3f}   {f1['pooled']:.3f}   {score['f1_macro']['mean']:.3f}"
            f"  {score['n_samples']:7,}  {score['n_classes']:7}"
        )
    flatter = scores["holdout off"]["f1_weighted"]["mean"] - scores[name]["f1_weighted"]["mean"]
    print(f"  plain folds flatter by {flatter:.3f}")

    unexpected = not_of_the_head(ran(head))
    print("\nTargets on 2 cores:")
    print(verdict("empty cache to leaderboard", until_leaderboard(first), "<=", REPRO_SECONDS, " s"))
    print(verdict("nothing changed", again.seconds, "<=", AGAIN_SECONDS, " s"))
    print(verdict("stages but register that ran with nothing changed", len(set(ran(again)) - {"register"}), "<=", 0))
    print(verdict("stages before the head that ran for its parameter", len(unexpected), "<=", 0))
    print(verdict("peak memory", first.peak_bytes / 2**30, "<=", GIB, " GiB"))
    for name, target in (("holdout off", F1_NO_HOLDOUT), ("normal holdout", F1_HOLDOUT)):
        print(verdict(f"weighted F1, {name}", scores[name]["f1_weighted"]["mean"], ">=", target))


def read_scores(root: Path) -> dict[str, Any]:
    """What the stage `evaluate` found."""
    scores: dict[str, Any] = json.loads((root / "data" / "evaluate" / MODEL / "metrics.json").read_text())
    return scores


def until_leaderboard(watched: Watched) -> float:
    """Seconds without the stages that come after the leaderboard."""
    found = stages(watched)
    return watched.seconds - sum(found[name][1] for name in AFTER_LEADERBOARD)


def stages_that_ran(watched: Watched) -> str:
    """A phrase that names the stages that ran."""
    return f"ran {', '.join(ran(watched))}" if ran(watched) else "no stage ran"


def not_of_the_head(names: list[str]) -> list[str]:
    """Those stages that a parameter of the model's head should not have started again."""
    return [name for name in names if name.split("@")[0] not in ALLOWED_AFTER_HEAD]


if __name__ == "__main__":
    main()
