"""What the stage `compress` shows: a table on the terminal, a page with a picture, and a card for each version."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline_steps import model_card, pages
from pipeline_steps.complexity.compress.refitted import Refitted
from pipeline_steps.complexity.compress.timing import N_THREADS, ROUNDS
from pipeline_steps.files import write_text
from pipeline_steps.params import flat
from pipeline_steps.plots import BLUE, PALE, SOFT, figure, log_ticks, short
from pipeline_steps.plots_compare import label_points
from pipeline_steps.units import with_unit

if TYPE_CHECKING:
    from pipeline_steps.complexity.compress.scoring import Scored

LOG_WIDTH = 1000  # columns where the output is no terminal
PICTURE = "quality_against_cost"


def write_card(
    refitted: Refitted,
    about: dict[str, Any],
    settings: dict[str, Any],
    scored: "Scored",
    reports: Path,
    packaged: Path,
) -> None:
    """Writes the model card of one version: a page into `reports`, README.md into its package.

    Args:
        about: as in its metrics.json.
        settings: of the training that its weights come from, by dotted key.
    """
    params, samples = refitted.settings_of_all, refitted.samples
    card = model_card.collect(params, refitted.root, about, samples, scored.held, refitted.travels["data_version"])
    card["compression"] = {"name": about["technique"], "told": about["told"]}
    card["cost"] = {key: about[key] for key in ("params", "macs", "input_size")}
    technique = params.compress.techniques[about["technique"]]
    card["settings"] = {"epochs": about["epochs"], **settings, **flat("compress", technique.model_dump())}
    model_card.write(reports, packaged, card)


def write_page(refitted: Refitted, table: pd.DataFrame, reports: Path) -> None:
    """Writes index.html and, where there is a holdout, the picture."""
    drawn = table[table["f1_change"].notna()]
    if len(drawn):
        quality_against_cost(reports / f"{PICTURE}.png", drawn)
    about = {
        "model": refitted.model,
        "n_holdout": refitted.about["n_holdout"],
        "candidate": refitted.settings_of_all.compress.candidate,
        "n_threads": N_THREADS,
        "rounds": ROUNDS,
    }
    rows = table.to_dict("records")
    page = pages.render("compression.html.j2", rows=rows, about=about, picture=pages.pictures_of(reports))
    write_text(reports / "index.html", page)


def quality_against_cost(path: Path, table: pd.DataFrame) -> None:
    """The change in weighted F1 with its interval, over the time for an image and over the size of the package.

    Args:
        path: the PNG to write.
        table: as `compress.run` returns it, rows that were made and scored.
    """
    change = 100 * table["f1_change"].to_numpy()
    error = np.vstack([change - 100 * table["f1_change_low"], 100 * table["f1_change_high"] - change]).clip(min=0)
    names = [short(name) for name in table["name"]]
    costs = [
        (table["latency_1_ms"].to_numpy(), "one image, quickest round (ms, log scale)", "Quality against time"),
        (table["size_bytes"].to_numpy(dtype=float) / 1e6, "package on disk (MB, log scale)", "Quality against size"),
    ]
    with figure(path, 9.6, 4.6) as drawing:
        for place, (cost, label, title) in enumerate(costs):
            axes = drawing.add_subplot(1, 2, place + 1, xscale="log")
            axes.axhline(0, color=PALE, lw=1.2, zorder=1)
            axes.axvline(cost[0], color=PALE, lw=1.2, zorder=1)
            axes.errorbar(cost, change, yerr=error, fmt="none", ecolor=SOFT, elinewidth=1.2, capsize=3, zorder=2)
            axes.scatter(cost[1:], change[1:], s=54, color=BLUE, zorder=3)
            axes.scatter(cost[:1], change[:1], s=54, facecolor="white", edgecolor=BLUE, zorder=3)
            axes.set_xlim(cost.min() / 1.8, cost.max() * 1.8)
            log_ticks(axes.xaxis, lambda cost: f"{cost:g}")
            axes.margins(y=0.14)
            axes.set_xlabel(label)
            axes.set_ylabel("change in weighted F1 (points), 95% interval" if place == 0 else "")
            axes.set_title(title, loc="left")
        drawing.draw_without_rendering()
        for axes, (cost, *_) in zip(drawing.axes, costs, strict=True):
            label_points(axes, cost, change, error, [], names)


def print_table(table: pd.DataFrame, candidate: str | None) -> None:
    """Prints the table, the candidate in bold, then what was not possible."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    shown = Table(title="Cheaper versions: scores on the same holdout", title_justify="left", box=box.SIMPLE)
    shown.add_column("version", no_wrap=True)
    for title in ("weighted F1", "change", "MB", "params", "MACs", "ms, batch 1", "ms an image, batch 32"):
        shown.add_column(title, justify="right", no_wrap=True)
    for row in table[table["not_possible"] == ""].to_dict("records"):
        scored = not np.isnan(row["f1_weighted"])
        cells = [f"{row['f1_weighted']:.3f}", f"{row['f1_change']:+.3f}"] if scored else ["—", "—"]
        cells += [f"{row['size_bytes'] / 1e6:.2f}", with_unit(row["params"]), with_unit(row["macs"])]
        cells += [f"{row['latency_1_ms']:.2f}", f"{row['latency_32_ms']:.2f}"]
        shown.add_row(Text(row["name"]), *cells, style="bold" if row["name"] == candidate else "")
    console.print(shown)
    for row in table[table["not_possible"] != ""].to_dict("records"):
        console.print(Text(f"{row['name']} is not possible: {row['not_possible']}."))
