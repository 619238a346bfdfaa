"""Stage `compare`: the evaluated models become a leaderboard, a choice with its reason, and the landing page."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline_steps import metrics, pages, plots_compare
from pipeline_steps.errors import PleatError
from pipeline_steps.evaluate import number_or_none
from pipeline_steps.files import read_json, write_csv, write_json, write_text
from pipeline_steps.metrics import HEADLINES, Spread
from pipeline_steps.params import Params
from pipeline_steps.plots import with_spread
from pipeline_steps.units import with_unit

TARGET_SCORES = ("f1_weighted", "accuracy")  # that are shown of each target
LOG_WIDTH = 1000  # columns where the output is no terminal, so that a log never cuts a name


@dataclass(frozen=True)
class Choice:
    """The best model, and how it stands to the runner-up (None where only one model ran)."""

    model: str
    f1_weighted: float
    runner_up: str | None
    lead: Spread | None  # paired by fold
    reason: str

    @property
    def is_clear(self) -> bool:
        """Whether the lead is larger than what another division into folds could turn round."""
        return self.lead is None or self.lead.ci95_low > 0


def run(params: Params, root: Path = Path()) -> pd.DataFrame:
    """Writes reports/ (leaderboard.csv, leaderboard.json, two pictures, index.html) and data/compare.

    data/compare holds chosen.json, the choice with its reason, and targets.csv, each model's weighted F1 and accuracy
    on each target. Only the models of `params.experiment.models` count. The leaderboard is printed too.

    Returns:
        The leaderboard, best first: by mean weighted F1, then fewer MACs, then name. One row a model; model, each
        headline score (the mean over targets) with _std, f1_weighted_ci95_low and _high, params (weights), macs (for
        one image), input_size (pixels a side). Undefined numbers are NaN.

    Raises:
        PleatError: a model is not evaluated or profiled, or models were scored on different data.
    """
    data, models, targets = root / "data", params.experiment.models, list(params.targets)
    summaries = {model: read_json(data / "evaluate" / model / "metrics.json") for model in models}
    _check_same_data(summaries, len(params.experiment.folds), targets)
    board = leaderboard(summaries, {model: read_json(data / "profile" / f"{model}.json") for model in models})
    ranked = list(board["model"])
    by_fold = {model: summaries[model]["f1_weighted"]["folds"] for model in ranked}
    choice = choose(board, by_fold, len(targets))
    reports = root / "reports"
    by_target = target_scores(summaries, ranked, targets)
    classes = class_f1(reports, ranked, targets)

    write_csv(reports / "leaderboard.csv", board)
    write_json(reports / "leaderboard.json", _by_model(board))
    plots_compare.quality_against_macs(reports / "quality_against_macs.png", board, len(targets))
    plots_compare.f1_by_fold(reports / "f1_by_fold.png", params.experiment.folds, by_fold, len(targets))
    chosen = {"model": choice.model, "f1_weighted": choice.f1_weighted, "reason": choice.reason}
    write_json(data / "compare" / "chosen.json", chosen)
    write_csv(data / "compare" / "targets.csv", by_target)
    counts_file = data / "validate" / "counts.json"
    counts = read_json(counts_file) if counts_file.exists() else {}
    if counts:
        counts["dropped"] = {label: sum(n.values()) for label, n in counts["dropped"].items() if sum(n.values())}
    page = pages.landing_page(
        board,
        choice,
        next(iter(summaries.values())),
        by_target,
        classes,
        counts=counts,
        reports=reports,
    )
    write_text(reports / "index.html", page)
    print_board(board, by_target, choice.model, choice.reason)
    return board


def show(root: Path = Path()) -> None:
    """Prints the leaderboard of the last run again.

    Raises:
        PleatError: no run has finished yet.
    """
    compared = root / "data" / "compare"
    chosen = read_json(compared / "chosen.json")
    board = pd.read_csv(root / "reports" / "leaderboard.csv", dtype={"model": str})
    # A target may be called "1" or "NA": only empty numbers are missing here.
    names, empty = {"model": str, "target": str}, {key: [""] for key in TARGET_SCORES}
    by_target = pd.read_csv(compared / "targets.csv", dtype=names, keep_default_na=False, na_values=empty)
    print_board(board, by_target, chosen["model"], chosen["reason"])


def leaderboard(summaries: dict[str, Any], profiles: dict[str, Any]) -> pd.DataFrame:
    """One row a model, best first; see `run` for the columns.

    Args:
        summaries: model to the content of its metrics.json.
        profiles: model to {"params", "macs", "input_size"}.
    """
    rows = []
    for model, summary in summaries.items():
        row: dict[str, Any] = {"model": model}
        for name in HEADLINES:
            row |= {name: summary[name]["mean"], f"{name}_std": summary[name]["std"]}
            if name == "f1_weighted":
                row |= {f"{name}_{key}": summary[name][key] for key in ("ci95_low", "ci95_high")}
        rows.append(row | {key: int(profiles[model][key]) for key in ("params", "macs", "input_size")})
    board = pd.DataFrame(rows)
    # None of JSON becomes NaN; the costs stay whole numbers.
    scores = [column for column in map(str, board.columns) if column.startswith(HEADLINES)]
    board = board.astype(dict.fromkeys(scores, float))
    return board.sort_values(["f1_weighted", "macs", "model"], ascending=[False, True, True], ignore_index=True)


def choose(board: pd.DataFrame, folds: dict[str, list[float]], n_targets: int) -> Choice:
    """Takes the first of the leaderboard and says in plain sentences how sure that is.

    Args:
        board: the leaderboard, best first.
        folds: model to its weighted F1 on each fold, the same folds for all.
        n_targets: over which it is a mean.
    """
    best = board.iloc[0]
    model, score, k = str(best["model"]), float(best["f1_weighted"]), len(folds[str(best["model"])])
    over = f"{k} folds" if k > 1 else "one fold"
    if n_targets > 1:
        over = f"{n_targets} targets and {over}"
    what = "weighted F1" if over == "one fold" else "mean weighted F1"
    interval = f"{score:.3f}"
    if k > 1:
        interval += f", 95% interval {best['f1_weighted_ci95_low']:.3f} to {best['f1_weighted_ci95_high']:.3f}"
    if len(board) == 1:
        reason = f"{model} is the only model that ran; its {what} over {over} is {interval}."
        return Choice(model, score, None, None, reason)
    second = board.iloc[1]
    runner_up = str(second["model"])
    lead = metrics.paired_difference(folds[model], folds[runner_up])
    wins = sum(one > other for one, other in zip(folds[model], folds[runner_up], strict=True))
    reason = f"{model} has the highest {what} of {len(board)} models over {over} ({interval}). It leads {runner_up} by "
    reason += f"{lead.mean:.3f}"
    choice = Choice(model, score, runner_up, lead, reason)
    if k == 1:
        reason += ". From one fold nobody can tell how sure that is."
    else:
        reason += (
            f" and is ahead on {wins} of the {k} folds; paired by fold, the 95% interval of the lead is "
            f"{lead.ci95_low:+.3f} to {lead.ci95_high:+.3f}"
        )
        if choice.is_clear:
            return replace(choice, reason=f"{reason}, so it is larger than the fold-to-fold spread.")
        reason += (
            f", so it lies inside the fold-to-fold spread: these folds do not show that {model} is the better one."
        )
    if second["macs"] < best["macs"]:
        reason += f" {runner_up} needs only {_share(second['macs'], best['macs'])} of the MACs."
    return replace(choice, reason=reason)


def target_scores(summaries: dict[str, Any], models: list[str], targets: list[str]) -> pd.DataFrame:
    """Columns model, target, f1_weighted, accuracy (means over folds), in the order given; undefined ones are NaN."""
    rows = [
        {"model": model, "target": target}
        | {name: summaries[model]["targets"][target][name]["mean"] for name in TARGET_SCORES}
        for model in models
        for target in targets
    ]
    return pd.DataFrame(rows).astype(dict.fromkeys(TARGET_SCORES, float))


def class_f1(reports: Path, models: list[str], targets: list[str]) -> pd.DataFrame:
    """Mean F1 of each class: a column a model, index (target, class, support).

    By target, in the order given, then the most frequent class first.

    Raises:
        PleatError: a model has no per-class table.
    """
    frames = []
    for target in targets:
        columns = []
        for model in models:
            folder = reports / "models" / model
            path = (folder / target if len(targets) > 1 else folder) / "per_class.csv"
            if not path.exists():
                raise PleatError(f"{path} is missing: {model} is not evaluated; run `dvc repro`.")
            # A class may be called "NA" or "null": only empty numbers are missing here.
            table = pd.read_csv(path, dtype={"class": str}, keep_default_na=False, na_values={"f1_mean": [""]})
            table = table.assign(target=target).set_index(["target", "class", "support"])
            columns.append(table["f1_mean"].rename(model))
        frame = pd.concat(columns, axis=1)
        frames.append(frame.sort_index(level=["support", "class"], ascending=[False, True]))
    return pd.concat(frames)


def print_board(board: pd.DataFrame, by_target: pd.DataFrame, chosen: str, reason: str) -> None:
    """Prints the leaderboard, the targets where there are several, and the reason for the choice."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    targets = list(dict.fromkeys(by_target["target"]))
    of_targets = f"mean of {len(targets)} targets, " if len(targets) > 1 else ""
    over_folds = "one fold" if board["f1_weighted_std"].isna().all() else "mean over folds ± standard deviation"
    table = _table(f"Leaderboard: {of_targets}{over_folds}", "model")
    for title in ("weighted F1", "macro F1", "accuracy", "ROC-AUC", "params", "MACs"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in board.to_dict("records"):
        first, *others = HEADLINES
        scores = [with_spread(row[first], row[f"{first}_std"]), *(with_spread(row[name], None) for name in others)]
        style = "bold" if row["model"] == chosen else ""
        table.add_row(Text(row["model"]), *scores, with_unit(row["params"]), with_unit(row["macs"]), style=style)
    console.print(table)
    if len(targets) > 1:
        console.print(_target_table(by_target, targets))
    console.print(Text(reason))


def _target_table(by_target: pd.DataFrame, targets: list[str]) -> Table:
    table = _table("Targets: weighted F1 / accuracy", "target")
    models = list(dict.fromkeys(by_target["model"]))
    scores = {(row["target"], row["model"]): row for row in by_target.to_dict("records")}
    for model in models:
        table.add_column(Text(model), justify="right", no_wrap=True)
    for target in targets:
        cells = [
            " / ".join(with_spread(scores[target, model][name], None) for name in TARGET_SCORES) for model in models
        ]
        table.add_row(Text(target), *cells)
    return table


def _table(title: str, first_column: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column(first_column, no_wrap=True)
    return table


def _check_same_data(summaries: dict[str, Any], n_folds: int, targets: list[str]) -> None:
    first = next(iter(summaries))
    for model in summaries:
        scored = len(summaries[model]["f1_weighted"]["folds"])
        if scored != n_folds:
            raise PleatError(f"{model} was scored on {scored} folds, but params.yaml lists {n_folds}; run `dvc repro`.")
        if set(summaries[model]["targets"]) != set(targets):
            raise PleatError(
                f"{model} was scored on the targets {', '.join(sorted(summaries[model]['targets']))}, but params.yaml "
                f"lists {', '.join(sorted(targets))}; run `dvc repro`."
            )
        for key in ("n_samples", "n_classes"):
            if summaries[model][key] != summaries[first][key]:
                raise PleatError(
                    f"{first} was scored on {summaries[first][key]} {key[2:]}, but {model} on {summaries[model][key]}: "
                    "they cannot be compared. Run `dvc repro`, so that both are of the same split."
                )


def _by_model(board: pd.DataFrame) -> dict[str, Any]:
    records = board.to_dict("records")
    return {
        row["model"]: {
            str(key): number_or_none(value) if isinstance(value, float) else value
            for key, value in row.items()
            if key != "model"
        }
        for row in records
    }


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if part / whole >= 0.01 else "less than 1%"
