"""The Great Expectations suite on the clean manifest: read from YAML, run, turned into pages and sentences."""

import difflib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline_steps.errors import PleatError
from pipeline_steps.params_errors import sentence
from pipeline_steps.params_models import Strict

ROWS_NAMED = 5
LABEL_COLUMN = "{label}"  # as the `column` of an expectation: one for each label column


class Rule(Strict):
    """One expectation of the YAML suite; keys beyond these four are the expectation's own arguments."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    expect: str
    severity: Literal["critical", "warning"]
    why: str
    advice: str

    def name(self) -> str:
        """The expectation and the column it looks at."""
        column = self.arguments().get("column")
        return f"{self.expect} on column '{column}'" if column else self.expect

    def arguments(self) -> dict[str, Any]:
        """What the expectation is called with."""
        return dict(self.model_extra or {})


class Outcome(Strict):
    """How one expectation ended; `rows` names at most a few of the failing ones."""

    rule: Rule
    success: bool
    observed: str
    rows: list[str]

    def sentence(self) -> str:
        """What failed, where, and what to do."""
        rows = f" Rows: {', '.join(self.rows)}." if self.rows else ""
        rule = self.rule
        return f"Expectation {rule.name()} failed: {rule.why}; found {self.observed}.{rows} {rule.advice}"


def read_suite(path: Path, label_columns: list[str]) -> list[Rule]:
    """Reads the suite; an entry whose column is `{label}` becomes a rule for each of the label columns.

    Raises:
        PleatError: the file is absent or no list of expectations, or an entry lacks one of the four keys of `Rule`.
    """
    try:
        entries = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PleatError(
            f"The expectation suite {path} does not exist; restore it with `git checkout {path}`."
        ) from None
    except YAMLError as error:
        raise PleatError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(entries, list) or not entries:
        raise PleatError(f"{path} must hold a list of expectations; restore it with `git checkout {path}`.")
    rules: list[Rule] = []
    for number, entry in enumerate(entries, start=1):
        try:
            rule = Rule.model_validate(entry)
        except ValidationError as error:
            raise PleatError(sentence(error.errors()[0], f"{path}, entry {number}")) from None
        for one in _of_each_column(rule, label_columns):
            if one in rules:
                raise PleatError(f"{path}, entry {number}: {one.name()} stands there twice; remove one.")
            rules.append(one)
    return rules


def _of_each_column(rule: Rule, label_columns: list[str]) -> list[Rule]:
    if rule.arguments().get("column") != LABEL_COLUMN:
        return [rule]
    return [rule.model_copy(update={"column": name}) for name in label_columns]


def run_suite(frame: pd.DataFrame, rules: list[Rule], docs: Path) -> list[Outcome]:
    """Validates `frame` and builds the Data Docs site in the folder `docs`.

    Raises:
        PleatError: an expectation's name or arguments are unknown to Great Expectations, or it cannot be evaluated.
    """
    import great_expectations as gx
    from great_expectations.core.run_identifier import RunIdentifier

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]
    suite = gx.ExpectationSuite(name="manifest")
    for number, rule in enumerate(rules):
        suite.add_expectation(_expectation(rule, number))
    suite = context.suites.add(suite)
    asset = context.data_sources.add_pandas("pleat").add_dataframe_asset("manifest")
    batch = asset.add_batch_definition_whole_dataframe("clean manifest")
    definition = context.validation_definitions.add(gx.ValidationDefinition(name="manifest", data=batch, suite=suite))
    site = {
        "class_name": "SiteBuilder",
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())},
    }
    context.variables.data_docs_sites = {}  # type: ignore[assignment]
    context.add_data_docs_site("reports", site)  # type: ignore[arg-type]
    result = definition.run(
        batch_parameters={"dataframe": frame},
        # The full list of failing rows grows with the data; a summary names enough of them.
        result_format={"result_format": "SUMMARY", "unexpected_index_column_names": ["batch", "source_path"]},
        run_id=RunIdentifier(run_name="validate"),
    )
    context.build_data_docs()
    # The results come in an order of their own.
    items = sorted(result.results, key=lambda item: item.expectation_config.meta["number"])
    return [_outcome(rule, item) for rule, item in zip(rules, items, strict=True)]


def _expectation(rule: Rule, number: int) -> Any:
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration
    from great_expectations.expectations.registry import list_registered_expectation_implementations

    known = list_registered_expectation_implementations()
    if rule.expect not in known:
        nearest = difflib.get_close_matches(rule.expect, known, n=1)
        hint = f"the nearest is {nearest[0]}" if nearest else "see its gallery of expectations"
        raise PleatError(f"Great Expectations knows no expectation {rule.expect}; {hint}.")
    try:
        return ExpectationConfiguration(
            type=rule.expect,
            kwargs=rule.arguments(),
            severity=rule.severity,
            description=rule.why,
            meta={"number": number},
        ).to_domain_obj()
    except Exception as error:  # the library raises several kinds for a bad configuration
        if not hasattr(error, "errors"):
            raise PleatError(f"{rule.name()} cannot be used: {' '.join(str(error).split())}.") from error
        first = error.errors()[0]
        raise PleatError(f"{rule.name()}: `{'.'.join(map(str, first['loc']))}`: {first['msg']}.") from error


def _outcome(rule: Rule, item: Any) -> Outcome:
    found = item.result or {}
    if not found:
        errors = item.exception_info or {}
        errors = errors.values() if "exception_message" not in errors else [errors]
        messages = "; ".join(dict.fromkeys(str(error["exception_message"]) for error in errors))
        raise PleatError(f"{rule.name()} could not be evaluated: {messages}")
    rows = [
        f"{index['batch']}/{index['source_path']} ({_plain(next(iter(index.values())))!r})"
        for index in found.get("partial_unexpected_index_list", [])[:ROWS_NAMED]
    ]
    if "unexpected_count" in found:
        observed = f"{found['unexpected_count']:,} of {found['element_count']:,} rows that break it"
    else:
        observed = f"{found.get('observed_value')}"
    return Outcome(rule=rule, success=bool(item.success), observed=observed, rows=rows)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
