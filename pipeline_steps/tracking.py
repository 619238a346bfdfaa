"""Every run in MLflow: one for each model's cross-validation, a child for each fold, one for the whole pipeline.

A run is found again by a key made of what went into it. So a fold that DVC took from its cache is linked, not logged
twice, and what could not be logged while a server was away is logged later by `pleat sync` from the stages' outputs.
"""

import math
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from pipeline_steps.buckets import redact
from pipeline_steps.files import FLOAT_FORMAT, read_json, read_parquet
from pipeline_steps.params import Params, flat
from pipeline_steps.progress import say
from pipeline_steps.targets import label_columns
from pipeline_steps.tracked_scores import by_target, holdout_scores, mean_scores, scores_of, spreads_of
from pipeline_steps.versions import (
    EXPERIMENT,
    EXPERIMENT_TAGS,
    LOCAL_STORE,
    airflow_run,
    code_version,
    data_version,
    digest,
    fold_key,
)

# A server that is away must not hold up training: MLflow's own defaults retry for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines a run
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # for a dozen small files

import mlflow
import requests
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

KEY_TAG = "pleat.key"
PARENT_TAG = "mlflow.parentRunId"
LINK = re.compile(r'<a href="(?!#|https?:)[^"]*">(.*?)</a>', re.DOTALL)
RUN_TAG = "pleat.run."  # with the name of an Airflow run: that run used this result


@contextmanager
def tolerant() -> Iterator[None]:
    """Turns a failure of MLflow into one line: a tracking server that is away never costs a training run."""
    try:
        yield
    except (MlflowException, OSError) as error:  # the exceptions of requests are OSErrors
        say(
            f"MLflow at {redact(tracking_uri())} cannot be used ({reason_of(error)}). "
            "Nothing is lost: results stay in data/ and reports/. Run `pleat sync` once MLflow is back."
        )


def reason_of(error: Exception) -> str:
    """What MLflow says of a failure, short and without passwords."""
    return redact(f"{type(error).__name__}: {' '.join(str(error).split())}")[:180]


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file in the project's folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or LOCAL_STORE


class Tracker:
    """Logs stage outputs to MLflow.

    Raises (all methods):
        MlflowException, OSError: MLflow cannot be reached; see `tolerant`.
    """

    def __init__(self, params: Params, root: Path = Path()) -> None:
        self.params, self.root = params, root
        uri = tracking_uri()
        if uri.startswith("http"):
            requests.get(f"{uri.rstrip('/')}/health", timeout=5).raise_for_status()
        # A SQLite store may be shared: the workspaces of Airflow's runs use the project's.
        shared = uri.startswith("sqlite:///") and Path(uri.removeprefix("sqlite:///")).is_absolute()
        home = Path(uri.removeprefix("sqlite:///")).parent if shared else root
        (home / ".pleat").mkdir(exist_ok=True)
        # Processes that migrate one new database at the same time all fail, so the first to come does it alone.
        with FileLock(home / ".pleat" / "mlflow.lock"):
            mlflow.set_tracking_uri(uri)
            self.client = MlflowClient(uri)
            found = self.client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                artifacts = (home / "mlruns").as_uri() if shared else None
                created = self.client.create_experiment(EXPERIMENT, artifacts, tags=EXPERIMENT_TAGS)
            self.experiment = found.experiment_id if found else created

    def epochs(self, model: str, fold: int, history: list[dict[Any, Any]]) -> None:
        """Logs the epochs that a fold's run does not have yet, in one batch.

        Args:
            history: one mapping an epoch: `epoch` (from 1) and its metrics.
        """
        run = self._fold_run(model, fold)
        if run.info.status == "FINISHED":
            return
        seen = self.client.get_metric_history(run.info.run_id, "train_loss")
        last = max((metric.step for metric in seen), default=0)
        fresh = [line for line in history if line["epoch"] > last]
        metrics = [metric for line in fresh for metric in _metrics(_as_written(line), step=int(line["epoch"]))]
        self.client.log_batch(run.info.run_id, metrics=metrics)

    def fold(self, model: str, fold: int) -> None:
        """Logs a finished fold from its outputs; one that MLflow already has is left as it is."""
        folder = self.root / "data" / "train" / model / f"fold_{fold}"
        self.epochs(model, fold, pd.read_csv(folder / "history.csv").to_dict("records"))
        run = self._fold_run(model, fold)
        if run.info.status != "FINISHED":
            about = read_json(folder / "metrics.json")
            epochs = {name: about[name] for name in ("best_epoch", "epochs")}
            scores = {
                name: scores_of(read_parquet(folder / "predictions" / f"{name}.parquet"), target.kind == "multilabel")
                for name, target in self.params.targets.items()
            }
            values = {**epochs, **by_target(mean_scores(scores), scores)}
            self.client.log_batch(run.info.run_id, metrics=_metrics(values, step=0))
            self._finish(run)

    def model(self, model: str) -> None:
        """Logs a model's folds, its cross-validation summary and its report."""
        for fold in self.params.experiment.folds:
            self.fold(model, fold)
        run = self._model_run(model)
        run_id = run.info.run_id
        summary = read_json(self.root / "data" / "evaluate" / model / "metrics.json")
        values = by_target(spreads_of(summary), {name: spreads_of(own) for name, own in summary["targets"].items()})
        self.client.log_batch(run_id, metrics=_metrics(values, step=0))
        self.client.log_artifacts(run_id, str(self.root / "reports" / "models" / model), "report")
        self._finish(run)

    def pipeline(self) -> None:
        """Logs the leaderboard with its pages and every model's cost, and ties the models' runs to this run."""
        run, runs = self._pipeline_run()
        run_id = run.info.run_id
        leaderboard = pd.read_csv(self.root / "reports" / "leaderboard.csv").set_index("model")
        chosen = read_json(self.root / "data" / "compare" / "chosen.json")
        self.client.set_tag(run_id, "pleat.chosen", chosen["model"])
        self.client.log_batch(run_id, metrics=_metrics({"f1_weighted": chosen["f1_weighted"]}, step=0))
        for model, part in runs.items():
            cost: dict[str, float | None] = {name: float(leaderboard[name][model]) for name in ("params", "macs")}
            report = self.root / "reports" / "complexity" / model
            if report.exists():
                cost |= read_json(report / "totals.json")[model]
                self.client.log_artifacts(part.info.run_id, str(report), "complexity")
            self.client.log_batch(part.info.run_id, metrics=_metrics(cost, step=0))
            self.client.set_tag(part.info.run_id, "pleat.pipeline_run", run_id)
            self.client.set_tag(run_id, f"pleat.model_run.{model}", part.info.run_id)
        for file in sorted((self.root / "reports").glob("*.*")):
            self._log_page(run_id, file, "report")
        self.client.log_artifacts(run_id, str(self.root / "reports" / "split"), "report/split")
        self._finish(run)

    def refit(self, about: Mapping[str, Any]) -> str:
        """The run that the refitted model, or a cheaper version of it, belongs to, below the pipeline's.

        Args:
            about: data/refit/metrics.json, or data/compress/models/NAME/metrics.json.
        """
        pipeline, _ = self._pipeline_run()
        model, key, version = about["model"], digest("refit", about["package"]), about.get("technique")
        kind = "compressed" if version else "refit"
        run = self._find_or_create(f"{model} {version or kind}", key, kind, model, pipeline.info.run_id)
        if run.info.status != "FINISHED":
            scores = by_target(
                holdout_scores(about), {name: holdout_scores(own) for name, own in about.get("targets", {}).items()}
            )
            costs = ("size_bytes", "params", "macs", "input_size", "latency_1_ms", "latency_32_ms")
            counts = {name: about[name] for name in ("epochs", "n_train", "n_holdout", *costs) if name in about}
            self.client.log_batch(run.info.run_id, metrics=_metrics({**counts, **scores}, step=0))
            reports = self.root / "reports"
            card = reports / "compression" / version if version else reports / "model_card"
            self.client.log_artifacts(run.info.run_id, str(card), "model_card")
            self._finish(run)
        return str(run.info.run_id)

    def compress(self) -> None:
        """Logs each cheaper version as a run below the pipeline's, and their table, picture and page with that one."""
        models = self.root / "data" / "compress" / "models"
        for name in read_json(models / "names.json"):
            self.refit(read_json(models / name / "metrics.json"))
        pipeline, _ = self._pipeline_run()
        for file in sorted((self.root / "reports" / "compression").glob("*.*")):
            self._log_page(pipeline.info.run_id, file, "report/compression")

    def sync(self) -> str | None:
        """Logs whatever finished stages have left in this folder and MLflow does not have.

        Returns:
            The id of the pipeline's run; None while the leaderboard is not finished.
        """
        data, experiment = self.root / "data", self.params.experiment
        for model in experiment.models:
            for fold in experiment.folds:
                if (data / "train" / model / f"fold_{fold}" / "metrics.json").exists():
                    self.fold(model, fold)
            evaluated = (data / "evaluate" / model / "metrics.json").exists()
            if evaluated and self._model_run(model).info.status != "FINISHED":
                self.model(model)
        if not (data / "compare" / "chosen.json").exists():
            return None
        run, _ = self._pipeline_run()
        if run.info.status != "FINISHED":
            self.pipeline()
        names = data / "compress" / "models" / "names.json"
        if names.exists() and read_json(names):
            self.compress()
        return str(run.info.run_id)

    def _log_page(self, run_id: str, file: Path, place: str) -> None:
        """Logs a file; of a page, which MLflow shows alone, links to pages beside it would lead nowhere."""
        if file.suffix == ".html":
            self.client.log_text(run_id, LINK.sub(r"\1", file.read_text(encoding="utf-8")), f"{place}/{file.name}")
        else:
            self.client.log_artifact(run_id, str(file), place)

    def _finish(self, run: Run) -> None:
        if run.info.status != "FINISHED":  # else its end and so its duration would move
            self.client.set_terminated(run.info.run_id)

    def _fold_run(self, model: str, fold: int) -> Run:
        parent = self._model_run(model)
        name = f"{model} fold {fold}"
        return self._find_or_create(name, self._fold_key(model, fold), "fold", model, parent.info.run_id, fold=fold)

    def _pipeline_run(self) -> tuple[Run, dict[str, Run]]:
        """The run of the whole pipeline, and the models' runs that it is made of."""
        runs = {model: self._model_run(model) for model in self.params.experiment.models}
        key = digest(*(run.data.tags[KEY_TAG] for run in runs.values()))
        return self._find_or_create(f"pipeline {self.params.experiment.recipe}", key, "pipeline"), runs

    def _model_run(self, model: str) -> Run:
        key = digest(*(self._fold_key(model, fold) for fold in self.params.experiment.folds))
        return self._find_or_create(model, key, "model", model)

    def _fold_key(self, model: str, fold: int) -> str:
        """The key that training wrote, which goes with the results to where the inputs are not; else made from them."""
        data, batches = self.root / "data", self.params.experiment.batches
        trained = data / "train" / model / f"fold_{fold}" / "metrics.json"
        if trained.exists():
            return str(read_json(trained)["key"])
        evaluated = self.root / "reports" / "models" / model / "keys.json"
        inputs = [data / "prepare" / model / batch / "inputs.json" for batch in batches]
        # Where the inputs are, an evaluation may be of an earlier training of a model of this name.
        if evaluated.exists() and not all(path.exists() for path in inputs):
            return str(read_json(evaluated)[str(fold)])
        return fold_key(self.params, model, fold, self.root)

    def _find_or_create(
        self, name: str, key: str, kind: str, model: str | None = None, parent: str | None = None, **params: Any
    ) -> Run:
        found = self._oldest(key)
        used_by = airflow_run(self.root).get("name")
        if found is not None:
            if used_by and RUN_TAG + used_by not in found.data.tags:
                self.client.set_tag(found.info.run_id, RUN_TAG + used_by, "yes")
            return found
        tags = {
            KEY_TAG: key, "mlflow.runName": name, "pleat.kind": kind, "pleat.recipe": self.params.experiment.recipe,
            "pleat.data_version": data_version(self.params.experiment.batches, self.root),
            "pleat.code_version": code_version(self.root), "mlflow.source.name": f"dvc.yaml ({kind})",
        }  # fmt: skip
        if parent:
            tags[PARENT_TAG] = parent
        if used_by:
            tags[RUN_TAG + used_by] = "yes"
        run: Run = self.client.create_run(self.experiment, tags=tags, run_name=name)
        self.client.log_batch(run.info.run_id, params=self._params(model, params))
        self._log_dataset(run.info.run_id)
        # Two processes may have created the same run at once: the older one stays, and both go on with it.
        oldest = self._oldest(key)
        if oldest is not None and oldest.info.run_id != run.info.run_id:
            self.client.delete_run(run.info.run_id)
            return oldest
        return run

    def _oldest(self, key: str) -> Run | None:
        runs = self.client.search_runs(
            [self.experiment], f"tags.`{KEY_TAG}` = '{key}'", order_by=["attributes.start_time ASC"]
        )
        return min(runs, key=lambda run: (run.info.start_time, run.info.run_id), default=None)

    def _params(self, model: str | None, more: Mapping[str, Any]) -> list[Param]:
        experiment = self.params.experiment
        values: dict[str, Any] = {"batches": experiment.batches, "folds": len(experiment.folds), **more}
        values |= {"seed": experiment.seed, **flat("split", self.params.split.model_dump())}
        if model:
            values |= {"model": model, **flat("model", self.params.models[model].model_dump())}
            values |= flat("training", self.params.training[model].model_dump())
        return [Param(key, str(value)[:6000]) for key, value in values.items()]

    def _log_dataset(self, run_id: str) -> None:
        path = self.root / "data" / "split" / "folds.parquet"
        name = ",".join(self.params.experiment.batches)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about integer columns, and two equal ways to read a local path
            labels = label_columns(self.params.targets)
            target = labels[0] if len(labels) == 1 else None  # MLflow knows of one only
            dataset = from_pandas(read_parquet(path), source=str(path), name=name, targets=target)
            entity = DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "training")])
        self.client.log_inputs(run_id, [entity])


def is_trained(data_version: str, recipe: str) -> bool:
    """Whether a run of the whole pipeline on this data has finished.

    Raises:
        MlflowException, OSError: MLflow cannot be reached; see `tolerant`.
    """
    return bool(_pipeline_runs({"data_version": data_version, "recipe": recipe}, "attributes.status = 'FINISHED' and "))


def newest_pipeline_run() -> Run | None:
    """The run of the whole pipeline that began last.

    Raises:
        MlflowException, OSError: MLflow cannot be reached; see `tolerant`.
    """
    return next(iter(_pipeline_runs({})), None)


def _pipeline_runs(tags: Mapping[str, str], condition: str = "") -> list[Run]:
    client = MlflowClient(tracking_uri())
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        return []
    wanted = {"kind": "pipeline", **tags}.items()
    query = condition + " and ".join(f"tags.`pleat.{tag}` = '{value}'" for tag, value in wanted)
    newest = ["attributes.start_time DESC"]
    return list(client.search_runs([found.experiment_id], query, max_results=1, order_by=newest))


def _as_written(line: Mapping[Any, Any]) -> dict[str, float | None]:
    """An epoch as history.csv has it: a run reads the same, logged while it trained or from that file."""
    return {name: None if value is None else float(FLOAT_FORMAT % value) for name, value in line.items()}


def _metrics(values: Mapping[str, float | None], step: int) -> list[Metric]:
    now = int(time.time() * 1000)
    return [
        Metric(key, float(value), now, step)
        for key, value in values.items()
        if key != "epoch" and value is not None and not math.isnan(value)
    ]
