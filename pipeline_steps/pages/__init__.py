"""The HTML pages: self-contained (pictures embedded, no script, nothing fetched), all data escaped."""

import base64
import io
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from pipeline_steps.serving.upright import upright_rgb
from pipeline_steps.units import with_unit

if TYPE_CHECKING:
    from pipeline_steps.compare import Choice

THUMBNAIL_PX = 160
THUMBNAIL_QUALITY = 80
CSS_PX_AN_INCH = 96
MAX_BAR = 100  # percent


def model_page(
    model: str,
    target: str | None,
    summary: Mapping[str, Any],
    folds: pd.DataFrame,
    classes: pd.DataFrame,
    pairs: pd.DataFrame | None,
    worst: pd.DataFrame,
    n_wrong: int,
    pictures: Path,
) -> str:
    """The page of one model, or of one of its targets.

    Args:
        model: its name.
        target: the target's name where there are several; None where the page is the model's only one.
        summary: what metrics.json holds of the target.
        folds: one row a fold, as in folds.csv.
        classes: one row a class, as in per_class.csv.
        pairs: the most frequent mistakes: actual, predicted, count, share; None for a multilabel target.
        worst: the gallery's rows: label, predicted, probability, batch, source_path, encoded.
        n_wrong: how many images have anything predicted wrong.
        pictures: folder that holds the PNG files.
    """
    # Late, as pages of tables alone need neither scikit-learn nor matplotlib.
    from pipeline_steps.plots import LABELS

    gallery = [row | {"thumbnail": thumbnail(row["encoded"])} for row in worst.to_dict("records")]
    return render(
        "model.html.j2",
        model=model,
        target=target,
        multilabel=summary["kind"] == "multilabel",
        summary=summary,
        folds=folds.to_dict("records"),
        classes=classes.sort_values(["support", "class"], ascending=[False, True]).to_dict("records"),
        pairs=pairs.to_dict("records") if pairs is not None else [],
        gallery=gallery,
        n_wrong=n_wrong,
        picture=pictures_of(pictures),
        scores=[name for name in LABELS if name in summary],
        label=LABELS,
    )


def targets_page(model: str, summary: Mapping[str, Any], folds: pd.DataFrame, pictures: Path) -> str:
    """The page of a model with several targets: their scores, with links, and what is common to them.

    Args:
        model: its name.
        summary: the content of metrics.json.
        folds: one row a fold: the means over targets.
        pictures: folder that holds the PNG files.
    """
    from pipeline_steps.metrics import HEADLINES
    from pipeline_steps.plots import LABELS

    return render(
        "targets.html.j2",
        model=model,
        summary=summary,
        folds=folds.to_dict("records"),
        picture=pictures_of(pictures),
        scores=HEADLINES,
        label=LABELS,
    )


def landing_page(
    board: pd.DataFrame,
    choice: "Choice",
    summary: Mapping[str, Any],
    targets: pd.DataFrame,
    class_f1: pd.DataFrame,
    counts: Mapping[str, Any],
    reports: Path,
) -> str:
    """The landing page of reports/.

    Args:
        board: the leaderboard, best first.
        choice: the chosen model and its reason.
        summary: metrics.json of any of the models, for what all share (samples, classes, folds).
        targets: weighted F1 and accuracy of each model on each target: columns model, target, f1_weighted, accuracy.
        class_f1: mean F1; index (target, class, support), a column a model.
        counts: data/validate/counts.json, or empty where there is none.
        reports: the folder the page will lie in; it links only to what exists there.
    """
    from pipeline_steps.metrics import HEADLINES
    from pipeline_steps.plots import LABELS

    links = [
        ("validation/index.html", "Data validation"),
        ("split/balance.png", "Balance of the split"),
        ("leaderboard.csv", "Leaderboard as CSV"),
    ]
    models = list(board["model"])
    names = list(dict.fromkeys(targets["target"]))
    return render(
        "landing.html.j2",
        board=board.to_dict("records"),
        choice=choice,
        summary=summary,
        targets=names,
        by_target={
            score: targets.pivot(index="target", columns="model", values=score).loc[names, models].values.tolist()
            for score in ("f1_weighted", "accuracy")
        },
        classes=[(*key, list(row)) for key, row in zip(class_f1.index, class_f1.values, strict=True)],
        models=models,
        has_page={model: (reports / "models" / model / "index.html").exists() for model in models},
        has_cost={model: (reports / "complexity" / model / "index.html").exists() for model in models},
        counts=counts,
        links=[(target, title) for target, title in links if (reports / target).exists()],
        picture={name: embedded_png(reports / f"{name}.png") for name in ("quality_against_macs", "f1_by_fold")},
        headlines=HEADLINES,
        label=LABELS,
    )


def render(template: str, **content: Any) -> str:
    """Fills in one of the templates beside this file; all data is escaped for HTML, which Markdown may hold too."""
    return _environment().get_template(template).render(**content)


def pictures_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The PNG files of a folder by their stems, ready to be shown."""
    return {path.stem: embedded_png(path) for path in sorted(folder.glob("*.png"))}


def thumbnail(encoded: bytes) -> str | None:
    """The image as a data URI of a JPEG of at most 160 x 160 pixels, upright; None where it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            # Large JPEGs are decoded at a fraction of their size; twice the thumbnail keeps the resampling clean.
            image.draft("RGB", (2 * THUMBNAIL_PX, 2 * THUMBNAIL_PX))
            small = upright_rgb(image)
            small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    out = io.BytesIO()
    small.save(out, "JPEG", quality=THUMBNAIL_QUALITY)
    return _data_uri("image/jpeg", out.getvalue())


def embedded_png(path: Path) -> dict[str, Any]:
    """A PNG as data URI with the width in CSS pixels at which its letters have their intended size."""
    encoded = path.read_bytes()
    with Image.open(io.BytesIO(encoded)) as image:
        dpi = image.info.get("dpi", (CSS_PX_AN_INCH, CSS_PX_AN_INCH))[0]
        return {"uri": _data_uri("image/png", encoded), "width": round(image.width / dpi * CSS_PX_AN_INCH)}


def _data_uri(media_type: str, encoded: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(encoded).decode('ascii')}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"score": _score, "unit": with_unit, "heat": _heat, "bars": _bars}
    return environment


def _score(value: float | None, form: str = ".3f") -> str:
    return "—" if value is None or np.isnan(value) else format(value, form)


def _heat(value: float | None) -> str:
    """CSS of a heat-map cell: white at 0, deep blue at 1, letters that stay readable on it."""
    if value is None or np.isnan(value):
        return "background: repeating-linear-gradient(45deg, #fff 0 4px, #eaeef2 4px 8px)"
    share = min(max(value, 0.0), 1.0) ** 1.5  # the steps that matter lie near the top
    red, green, blue = (round(255 + (deep - 255) * share) for deep in (8, 81, 156))
    return f"background: rgb({red}, {green}, {blue}); color: {'#fff' if share > 0.7 else '#1f2328'}"


def _bars(counts: Mapping[str, int]) -> Sequence[dict[str, Any]]:
    """Rows of a bar list, the longest first: name, count and width in percent."""
    largest = max(counts.values(), default=0) or 1
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"name": name, "count": count, "width": round(MAX_BAR * count / largest, 1)} for name, count in rows]
