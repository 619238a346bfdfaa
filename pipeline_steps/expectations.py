"""The Great Expectations suite on the clean manifest: read from YAML, run, turned into pages and sentences."""

from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import ConfigDict, ValidationError
from ruamel.yaml import YAML

from pipeline_steps.errors import PleatError
from pipeline_steps.params import Strict

ROWS_NAMED = 5


class Rule(Strict):
    """One expectation of the YAML suite; keys beyond these four are the expectation's own arguments."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    expect: str
    severity: Literal["critical", "warning"]
    why: str
    advice: str


class Outcome(Strict):
    """How one expectation ended; `rows` names at most a few of the failing ones."""

    rule: Rule
    success: bool
    observed: str
    rows: list[str]

    def sentence(self) -> str:
        """What failed, where, and what to do."""
        rule = self.rule
        column = (rule.model_extra or {}).get("column")
        where = f" on column '{column}'" if column else ""
        rows = f" Rows: {', '.join(self.rows)}." if self.rows else ""
        return f"Expectation {rule.expect}{where} failed: {rule.why}; found {self.observed}.{rows} {rule.advice}"


def read_suite(path: Path) -> list[Rule]:
    """Reads the suite.

    Raises:
        PleatError: the file is absent or an entry lacks one of expect, severity, why, advice.
    """
    try:
        entries = YAML(typ="safe").load(path)
        return [Rule.model_validate(entry) for entry in entries]
    except FileNotFoundError:
        raise PleatError(f"The expectation suite {path} does not exist; restore it with `git checkout {path}`.") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise PleatError(f"{path}: `{'.'.join(map(str, first['loc']))}` {first['msg'].lower()}.") from None


def run_suite(frame: pd.DataFrame, rules: list[Rule], docs: Path) -> list[Outcome]:
    """Validates `frame` and builds the Data Docs site in the folder `docs`.

    Raises:
        PleatError: an expectation's name or arguments are unknown to Great Expectations.
    """
    import great_expectations as gx
    from great_expectations.core.run_identifier import RunIdentifier
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]
    suite = gx.ExpectationSuite(name="manifest")
    for rule in rules:
        try:
            suite.add_expectation_configuration(
                ExpectationConfiguration(
                    type=rule.expect, kwargs=dict(rule.model_extra or {}), severity=rule.severity, description=rule.why
                )
            )
        except Exception as error:  # the library raises several kinds for a bad configuration
            raise PleatError(f"The expectation {rule.expect} cannot be used: {error}") from error
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
    return [_outcome(rule, item) for rule, item in zip(rules, result.results, strict=True)]


def _outcome(rule: Rule, item: Any) -> Outcome:
    found = item.result or {}
    rows = [
        f"{index['batch']}/{index['source_path']} ({next(iter(index.values()))!r})"
        for index in found.get("partial_unexpected_index_list", [])[:ROWS_NAMED]
    ]
    if "unexpected_count" in found:
        observed = f"{found['unexpected_count']:,} of {found['element_count']:,} rows that break it"
    else:
        observed = str(found.get("observed_value", item.exception_info))
    return Outcome(rule=rule, success=bool(item.success), observed=observed, rows=rows)
