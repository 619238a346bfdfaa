"""The pages of reports/validation: a landing page, and Great Expectations' own pages made to stand alone."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline_steps.expectations import Outcome

PAGES = Path(__file__).parent / "pages"
EXAMPLES_A_REASON = 5
# Great Expectations writes values into its pages unescaped; with this nothing in them runs, and nothing is fetched.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
SCRIPTED = re.compile(r"<(script|style|footer)\b.*?</\1>|<link\b[^>]*>|<img\b[^>]*>", re.DOTALL)


def write_pages(docs: Path, outcomes: list[Outcome], counts: Mapping[str, Any], quarantine: pd.DataFrame) -> None:
    """Leaves index.html, results.html and suite.html in `docs`; none of them needs a network or a script.

    Args:
        docs: the folder that holds the Data Docs site that Great Expectations built.
        outcomes: of every expectation, in the order of the suite.
        counts: the content of data/validate/counts.json.
        quarantine: its rows, for a few examples of each reason.
    """
    results = next((docs / "validations").rglob("*.html")).read_text(encoding="utf-8")
    suite = next((docs / "expectations").rglob("*.html")).read_text(encoding="utf-8")
    for folder in ("validations", "expectations", "static"):
        shutil.rmtree(docs / folder)
    (docs / "results.html").write_text(_alone(results), encoding="utf-8")
    (docs / "suite.html").write_text(_alone(suite), encoding="utf-8")
    (docs / "index.html").write_text(_landing(outcomes, counts, quarantine), encoding="utf-8")


def classes_in_words(labels: Mapping[str, Mapping[str, int]]) -> str:
    """How many classes there are: "17 classes", or of several label columns "6 colour and 5 garment classes".

    Args:
        labels: the number of images of each label, by label column.
    """
    if len(labels) == 1:
        return f"{len(next(iter(labels.values())))} classes"
    *most, last = (f"{len(of_column)} {column}" for column, of_column in labels.items())
    return f"{', '.join(most)} and {last} classes"


def _alone(page: str) -> str:
    head = (
        f'<head>\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<style>\n{(PAGES / 'great_expectations.css').read_text(encoding='utf-8')}</style>"
    )
    page = SCRIPTED.sub("", page).replace("<head>", head, 1)
    page = re.sub(r'href="[./]*index\.html"', 'href="index.html"', page)
    return re.sub(r'href="[./]*expectations/manifest\.html"', 'href="suite.html"', page)


def _landing(outcomes: list[Outcome], counts: Mapping[str, Any], quarantine: pd.DataFrame) -> str:
    from pipeline_steps.pages import render  # late, since whoever only asks for the number of classes needs no plots

    left_out = [
        (reason, len(rows), rows.head(EXAMPLES_A_REASON).to_dict("records"))
        for reason, rows in sorted(quarantine.groupby("reason"), key=lambda item: (-len(item[1]), item[0]))
    ]
    classes = classes_in_words(counts["labels"])
    return render("validation.html.j2", outcomes=outcomes, counts=counts, left_out=left_out, classes=classes)
