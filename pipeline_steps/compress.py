"""Stage `compress`: cheaper versions of the refitted model, scored on the same holdout and timed side by side.

Where params.yaml asks for none, it writes a page that says so, and nothing heavy is imported.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_steps.errors import PleatError
from pipeline_steps.files import atomic_folder, read_json, remove, write_csv, write_json, write_text
from pipeline_steps.params import Params
from pipeline_steps.params_compress import (
    REFITTED,
    Compress,
    Distilled,
    Int8,
    SharedWeights,
    SmallerInput,
    Technique,
)
from pipeline_steps.progress import say

if TYPE_CHECKING:
    import pandas as pd

    from pipeline_steps.complexity.compress.refitted import Made, Refitted
    from pipeline_steps.complexity.compress.scoring import Scored
    from pipeline_steps.complexity.compress.timing import Timing

MODELS = Path("data/compress/models")  # NAME/package and NAME/metrics.json of each version
REPORTS = Path("reports/compression")
SCRATCH = Path(".pleat/compress")  # what was made so far; DVC empties a stage's outputs before it runs again
# What a version depends on, beside settings and data; files and folders of pipeline_steps, all of them in dvc.yaml too.
CODE = (
    "complexity/compress", "complexity/field.py", "complexity/layers.py", "complexity/layout.py",
    "complexity/operations.py", "complexity/receptive_field.py", "complexity/recorder.py", "complexity/trace.py",
    "fitting.py", "package.py", "packed.py", "prepare.py", "refit.py", "serving", "targets.py", "train.py", "vision",
)  # fmt: skip


def run(params: Params, root: Path = Path()) -> "pd.DataFrame | None":
    """Writes data/compress (models/, metrics.json) and reports/compression (index.html, table.csv, a picture, cards).

    An interrupted run goes on after the last version that it finished, and a training after its last epoch. Finished
    versions stay in `SCRATCH`, so that another run of the stage makes only what has changed.

    Returns:
        The table, or None where params.yaml lists no technique. One row a version, the refitted model first: name,
        kind, f1_weighted, f1_change (from the refitted model's) with f1_change_low and _high, f1_macro, accuracy,
        size_bytes (of the package), params, macs, input_size, latency_1_ms and latency_32_ms (an image, in batches of 1
        and 32; of the quickest round) with _median and _slowest, told (what was done) and not_possible (why there is
        nothing). What is not known is NaN.

    Raises:
        PleatError: the stages before have not run, weights cannot be had, or the candidate cannot be made.
    """
    if not params.compress.techniques:
        _write_nothing(root)
        say("compress: no technique is listed in `compress.techniques`, so the refitted model stays as it is")
        return None
    from pipeline_steps.complexity.compress import scoring, timing
    from pipeline_steps.complexity.compress.refitted import Refitted
    from pipeline_steps.vision.lease import lease

    refitted = Refitted(params, root, root / SCRATCH)
    made: dict[str, Made] = {REFITTED: refitted.made}
    packages: dict[str, Path] = {REFITTED: refitted.package}
    refused: dict[str, str] = {}
    techniques = params.compress.techniques
    for name in _in_turn(params.compress):
        _make(refitted, name, techniques[name], made, packages, refused)
    packages = {name: packages[name] for name in (REFITTED, *techniques) if name in packages}
    scored: dict[str, Scored] = {}
    for name, folder in packages.items():
        scored[name] = scoring.score(refitted, folder)
        say(f"compress: {name}: {_told_score(scored[name])}")
    say(f"compress: timing {len(packages)} models in turns")
    with lease("compress: timing"):
        times = timing.time_in_turns(packages, {name: one.input_size for name, one in made.items()})
    table = _table(refitted, made, packages, refused, scored, times)
    _write(refitted, made, packages, scored, table)
    _tidy(root / SCRATCH, [folder.parent for name, folder in packages.items() if name != REFITTED])
    return table


def candidate(params: Params, root: Path) -> tuple[dict[str, Any], Path]:
    """What `register` judges: the metrics and the package of the refitted model, or of `compress.candidate`.

    Raises:
        PleatError: the stage before has not run.
    """
    name = params.compress.candidate
    place = root / "data" / "refit" if name is None else root / MODELS / name
    return dict(read_json(place / "metrics.json")), place / "package"


def _in_turn(settings: Compress) -> list[str]:
    """Names in the order in which they are made: the candidate and what it starts from come first.

    So a candidate that is not possible ends the stage before the long trainings of others.
    """
    first: list[str] = []
    name = settings.candidate
    while name is not None:
        first.insert(0, name)
        name = _source(settings.techniques[name])
    return [*first, *(name for name in settings.techniques if name not in first)]


def _source(technique: Technique) -> str | None:
    """The technique whose result this one changes; None: it starts from the refitted model."""
    return technique.of if isinstance(technique, Int8 | SharedWeights) else None


def _make(
    refitted: "Refitted",
    name: str,
    technique: Technique,
    made: dict[str, "Made"],
    packages: dict[str, Path],
    refused: dict[str, str],
) -> None:
    """Adds one version to `made` and `packages`, or the reason why there is none to `refused`."""
    from pipeline_steps.complexity.compress import techniques
    from pipeline_steps.complexity.compress.refitted import Made, NotPossibleError

    source = _source(technique) or REFITTED
    if source in refused:
        refused[name] = f"it starts from {source}, which was not possible"
    else:
        folder = refitted.scratch / f"{name}-{_key(refitted, technique, packages[source])}"
        try:
            if (folder / "made.json").is_file():
                say(f"compress: {name} was made before")
            else:
                say(f"compress: {name} ({technique.kind})")
                with atomic_folder(folder) as out:
                    (out / "package").mkdir()
                    found = techniques.make(refitted, name, technique, packages[source], made[source], out / "package")
                    write_json(out / "made.json", asdict(found))
            made[name], packages[name] = Made(**read_json(folder / "made.json")), folder / "package"
            return
        except NotPossibleError as reason:
            refused[name] = str(reason)
    if name == refitted.settings_of_all.compress.candidate:
        raise PleatError(
            f"`compress.candidate` is '{name}', which is not possible for {refitted.model}: {refused[name]}. Name "
            "another technique, or null for the refitted model itself."
        )
    say(f"compress: {name} is not possible: {refused[name]}")


def _key(refitted: "Refitted", technique: Technique, source: Path) -> str:
    """Names everything that a version depends on, so that no other one is taken for it."""
    from pipeline_steps import package
    from pipeline_steps.versions import digest

    params = refitted.settings_of_all
    settings = params.model_dump(exclude={"profile", "promotion", "inbox", "compress"})
    weights = ""
    if isinstance(technique, SmallerInput):
        weights = refitted.weights_of(refitted.settings)
    elif isinstance(technique, Distilled):
        weights = refitted.weights_of(params.models[technique.student])
    parts = json.dumps([technique.model_dump(), settings]), package.digest(source), weights
    return digest(*parts, *(path.read_bytes() for path in _code()))[:16]


def _code() -> list[Path]:
    """The files of `CODE`."""
    places = [Path(__file__).parent / name for name in CODE]
    return [path for place in places for path in (sorted(place.glob("*.py")) if place.is_dir() else [place])]


def _tidy(scratch: Path, kept: list[Path]) -> None:
    """Removes all but the finished versions of this table: inputs, checkpoints, versions of former settings."""
    for path in scratch.iterdir() if scratch.is_dir() else ():
        if path not in kept:
            remove(path)


def _told_score(scored: "Scored") -> str:
    if not scored.scores:
        return "no holdout to score it on"
    value = scored.scores["f1_weighted"]
    return "weighted F1 is undefined on the holdout" if value is None else f"weighted F1 {value:.4f} on the holdout"


def _table(
    refitted: "Refitted",
    made: "Mapping[str, Made]",
    packages: Mapping[str, Path],
    refused: Mapping[str, str],
    scored: "Mapping[str, Scored]",
    times: "Mapping[str, Mapping[int, Timing]]",
) -> "pd.DataFrame":
    import pandas as pd

    from pipeline_steps import package
    from pipeline_steps.complexity.compress import scoring

    techniques = refitted.settings_of_all.compress.techniques
    rows: list[dict[str, Any]] = []
    for name in (REFITTED, *techniques):
        row: dict[str, Any] = {"name": name, "kind": techniques[name].kind if name in techniques else REFITTED}
        if name in refused:
            rows.append(row | {"not_possible": refused[name]})
            continue
        scores = scored[name].scores
        row |= {score: scores.get(score) for score in ("f1_weighted", "f1_macro", "accuracy")}
        if scores:
            found = scoring.change(refitted, scored[name], scored[REFITTED])
            row |= {"f1_change": found.value, "f1_change_low": found.low, "f1_change_high": found.high}
        row |= {"size_bytes": package.n_bytes(packages[name]), **asdict(made[name])}
        for batch, timing in times[name].items():
            row |= {
                f"latency_{batch}_ms": timing.quickest_ms,
                f"latency_{batch}_ms_median": timing.median_ms,
                f"latency_{batch}_ms_slowest": timing.slowest_ms,
            }
        rows.append(row)
    latencies = [f"latency_{batch}_ms{end}" for batch in (1, 32) for end in ("", "_median", "_slowest")]
    columns = [
        "name", "kind", "f1_weighted", "f1_change", "f1_change_low", "f1_change_high", "f1_macro", "accuracy",
        "size_bytes", "params", "macs", "input_size", *latencies, "told", "not_possible",
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=columns)
    counts = ["size_bytes", "params", "macs", "input_size"]
    numbers = [name for name in columns if name not in ("name", "kind", *counts, "told", "not_possible")]
    texts = dict.fromkeys(("told", "not_possible"), "object")
    types = dict.fromkeys(numbers, "float64") | dict.fromkeys(counts, "Int64") | texts
    return table.astype(types).fillna(dict.fromkeys(texts, ""))


def _write_nothing(root: Path) -> None:
    from pipeline_steps import pages  # late: `register` needs none of it

    with atomic_folder(root / REPORTS) as out:
        write_text(out / "index.html", pages.render("compression.html.j2", rows=[], about=None, picture={}))
    with atomic_folder(root / MODELS) as out:
        write_json(out / "names.json", [])
    write_json(root / MODELS.parent / "metrics.json", {})
    _tidy(root / SCRATCH, [])


def _write(
    refitted: "Refitted",
    made: "Mapping[str, Made]",
    packages: Mapping[str, Path],
    scored: "Mapping[str, Scored]",
    table: "pd.DataFrame",
) -> None:
    import pandas as pd

    from pipeline_steps import compress_report, package

    root, params = refitted.root, refitted.settings_of_all
    rows = {row["name"]: row for row in table.to_dict("records")}
    metrics = {}
    with atomic_folder(root / REPORTS) as reports, atomic_folder(root / MODELS) as models:
        for name in [name for name in packages if name != REFITTED]:
            shutil.copytree(packages[name], models / name / "package")
            (reports / name).mkdir()
            about = refitted.about | scored[name].scores
            about |= {"targets": scored[name].targets, "technique": name, "told": made[name].told}
            about |= {key: int(rows[name][key]) for key in ("params", "macs", "input_size")}
            about["epochs"] = made[name].epochs
            packaged = models / name / "package"
            compress_report.write_card(refitted, about, made[name].settings, scored[name], reports / name, packaged)
            rows[name]["size_bytes"] = about["size_bytes"] = package.n_bytes(packaged)
            about["package"] = package.digest(packaged)
            about |= {key: rows[name][key] for key in ("latency_1_ms", "latency_32_ms")}
            write_json(models / name / "metrics.json", about)
            kept = ("f1_weighted", "size_bytes", "params", "macs", "latency_1_ms", "latency_32_ms")
            metrics[name] = {key: about[key] for key in kept if about.get(key) is not None}
        write_json(models / "names.json", list(metrics))
        table["size_bytes"] = pd.array([rows[name]["size_bytes"] for name in table["name"]], dtype="Int64")
        write_csv(reports / "table.csv", table)
        compress_report.write_page(refitted, table, reports)
    write_json(root / MODELS.parent / "metrics.json", metrics)
    compress_report.print_table(table, params.compress.candidate)
