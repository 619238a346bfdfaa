"""What `pleat profile` prints: totals, parts, the biggest layers, and what was measured."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline_steps.complexity.report import Profile, column_of, compared
from pipeline_steps.units import with_unit

LOG_WIDTH = 200  # columns where the output is no terminal
N_SHOWN = 8


def show(profiles: Sequence[Profile]) -> None:
    """Prints one profile, or two side by side."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    console.print(_totals(profiles))
    for profile in profiles:
        console.print(_parts(profile))
        console.print(_biggest(profile))
        for timing in profile.timings:
            low, high = timing.quartiles_ms
            console.print(
                Text(
                    f"Batch of {timing.batch} on {timing.place}: median {timing.median_ms:.1f} ms, "
                    f"quartiles {low:.1f} to {high:.1f} ms, {timing.runs} runs."
                )
            )
        console.print(Text("\n".join(profile.sentences())))
        if not profile.differences.empty:
            console.print(_differences(profile))


def _table(title: str, *columns: str) -> Table:
    """Names on the left, figures on the right."""
    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE)
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _totals(profiles: Sequence[Profile]) -> Table:
    names = [profile.name for profile in profiles]
    table = _table("One image, float32", "", *names, *(["second / first"] if len(names) > 1 else []))
    for row in compared(profiles):
        table.add_row(row["what"], *row["values"], *([row["times"]] if len(names) > 1 else []))
    return table


def _parts(profile: Profile) -> Table:
    timed = [f"ms, batch {timing.batch}, {'CPU' if timing.threads else 'GPU'}" for timing in profile.timings]
    titles = ("part", "gives", "parameters", "MACs", "share", *timed, "field px")
    table = _table(f"{profile.name}: parts", *titles)
    for row in profile.parts.to_dict("records"):
        field = row["receptive_field_px"]
        table.add_row(
            Text(row["part"]), row["output_shape"], with_unit(row["params"]), with_unit(row["macs"]),
            f"{row['share']:.1%}", *(f"{row[column_of(timing)]:.2f}" for timing in profile.timings),
            f"{field:,}" if isinstance(field, int) else ("whole" if row["whole_image"] else "—"),
        )  # fmt: skip
    return table


def _biggest(profile: Profile) -> Table:
    titles = ("layer", "kind", "gives", "kernel", "MACs", "share")
    table = _table(f"{profile.name}: layers with most MACs", *titles)
    for row in profile.biggest.head(N_SHOWN).to_dict("records"):
        table.add_row(
            Text(row["layer"]),
            row["kind"],
            row["output_shape"],
            row["kernel"],
            with_unit(row["macs"]),
            f"{row['share']:.1%}",
        )
    return table


def _differences(profile: Profile) -> Table:
    table = _table("Where the two counts differ", "layer", "kind", "MACs by its settings", "MACs by torch")
    for row in profile.differences.to_dict("records"):
        table.add_row(Text(row["layer"]), row["kind"], f"{row['macs']:,}", f"{row['macs_torch']:,}")
    return table
