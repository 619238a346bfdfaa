"""MLflow's model registry: versions, who is champion, and the history of every decision.

The history is a registered model of its own, NAME.history: each event is one version of it. MLflow numbers versions one
after the other, so all who write agree on the order, and an event that would change the champion counts only where the
champion before it is the one that it was judged against. Of two that race, the later one is void and judges again. The
alias `champion` follows the history. Neither hangs on the MLflow run that a model came from.
"""

import getpass
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import DataType
from mlflow.types.schema import AnyType, Array, ColSpec, Object, ParamSchema, ParamSpec, Property, Schema

# isort: off - tracking sets the environment that MLflow reads when it is imported
from pipeline_steps import tracking
from pipeline_steps.buckets import redact
from pipeline_steps.errors import PleatError
from pipeline_steps.versions import airflow_run

# isort: on
logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)  # about pip, which uv leaves out

CHAMPION, CHALLENGER = "champion", "challenger"
PACKAGE_TAG = "pleat.package"
CHANGES = ("promoted", "approved", "rolled back", "changed outside")  # what may make another version champion
OPEN = ("challenger", "approval requested")  # what leaves a version waiting behind the champion
FOLLOWED_TAG = "pleat.alias_follows"  # the newest event that the alias was set for
LOOK_AGAIN_S = 1.0
NO_FILES = "pleat:/history"  # MLflow wants an address of each version; those of the history are only their tags


@dataclass(frozen=True)
class Event:
    """One line of the history.

    Attributes:
        number: in the order in which they happened.
        kind: one of `CHANGES`, `OPEN`, "rejected" or "declined".
        at: UTC, ISO 8601.
        actor: who or what did it.
        version: of the model that it is about.
        before: the champion's version that it was judged against; empty where there was none.
        after: the champion's version where the event counts; empty for none.
        reasons: sentences.
        evidence: figures behind them.
        counts: whether it was in effect; else somebody else's event came first.
    """

    number: int
    kind: str
    at: str
    actor: str
    version: str
    before: str
    after: str
    reasons: list[str]
    evidence: dict[str, Any]
    counts: bool = True


@contextmanager
def reachable() -> Iterator[None]:
    """Turns a failure of MLflow into a sentence.

    Raises:
        PleatError: MLflow cannot be used; temporary, since the same command goes on later.
    """
    try:
        yield
    except (MlflowException, OSError) as error:  # the exceptions of requests are OSErrors
        raise PleatError(
            f"The registry in MLflow at {redact(tracking.tracking_uri())} cannot be used "
            f"({tracking.reason_of(error)}). "
            "The champion stays as it was; run the same command again.",
            temporary=True,
        ) from error


@contextmanager
def unless_missing() -> Iterator[None]:
    """Passes over the error that a model, version or alias does not exist; any other one is raised."""
    try:
        yield
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise


class Registry:
    """One registered model.

    Raises (all methods):
        MlflowException, OSError: MLflow cannot be reached; see `reachable`.
    """

    def __init__(self, name: str) -> None:
        uri = tracking.tracking_uri()
        mlflow.set_tracking_uri(uri)
        self.name, self.log_name, self.client = name, f"{name}.history", MlflowClient(uri)

    def version_of(self, digest: str) -> str:
        """The version that was made of a package; empty where there is none."""
        found = (item for item in self._versions(self.name) if item.tags.get(PACKAGE_TAG) == digest)
        return next((str(item.version) for item in found), "")

    def register(self, package: Path, digest: str, run_id: str, tags: dict[str, str]) -> str:
        """Makes a version of a package, or finds the one that was made of it before. Returns its number."""
        if version := self.version_of(digest):
            return version
        with _importable(package / "code"), mlflow.start_run(run_id=run_id):
            model = mlflow.pyfunc.log_model(name="model", **_arguments(package))
        self._ensure(self.name, "Image classifiers; the alias champion is the one in use.")
        made = self.client.create_model_version(
            self.name, model.model_uri, run_id, {PACKAGE_TAG: digest, **tags}, model_id=model.model_id
        )
        return str(made.version)

    def save(self, package: Path, folder: Path) -> Path:
        """Writes the MLflow model that `register` would log into `folder`, which is new; nothing is registered."""
        with _importable(package / "code"):
            mlflow.pyfunc.save_model(path=str(folder), **_arguments(package))
        return folder

    def download(self, version: str, folder: Path) -> Path:
        """Fetches a version's MLflow model into `folder`, which exists; returns where it lies."""
        uri = f"models:/{self.name}/{version}"
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))

    def exists(self, version: str) -> bool:
        """Whether the version was not deleted."""
        with unless_missing():
            self.client.get_model_version(self.name, version)
            return True
        return False

    def history(self) -> list[Event]:
        """Every event, the oldest first."""
        events: list[Event] = []
        champion = ""
        for item in sorted(self._versions(self.log_name), key=lambda item: int(item.version)):
            about = json.loads(item.tags["pleat.event"])
            counts = about["before"] == champion
            if counts and about["kind"] in CHANGES:
                champion = about["after"]
            events.append(Event(number=int(item.version), counts=counts, **about))
        return events

    def champion(self) -> str:
        """The version in use; empty where there is none. A change that somebody made in MLflow itself is recorded."""
        events = self._followed()
        if self._alias(CHAMPION) != champion_of(events):
            time.sleep(LOOK_AGAIN_S)  # another process may be about to set it
            events = self._followed()
            before, after = champion_of(events), self._alias(CHAMPION)
            if before != after:
                reasons = ["Somebody moved the alias champion in MLflow itself."]
                self.record("changed outside", after or before, before, after, reasons, {})
                events = self._followed()
        return champion_of(events)

    def record(
        self,
        kind: str,
        version: str,
        before: str,
        after: str,
        reasons: Sequence[str],
        evidence: dict[str, Any],
        by: str | None = None,
    ) -> Event:
        """Adds an event to the history and lets the aliases follow; see the event's `counts`."""
        self._ensure(self.log_name, f"Every decision about {self.name}, an event a version; see `pleat history`.")
        event = {
            "kind": kind, "at": datetime.now(UTC).isoformat(timespec="seconds"), "actor": by or actor(),
            "version": version, "before": before, "after": after, "reasons": list(reasons), "evidence": evidence,
        }  # fmt: skip
        title = f"{kind}: version {version}. " + " ".join(reasons)
        made = self.client.create_model_version(
            self.log_name, NO_FILES, tags={"pleat.event": json.dumps(event)},
            description=title[:5000],
        )  # fmt: skip
        return next(item for item in self._followed() if item.number == int(made.version))

    def describe(self, version: str, text: str, tags: dict[str, str]) -> None:
        """Sets a version's description and tags."""
        self.client.update_model_version(self.name, version, text[:5000])
        for key, value in tags.items():
            self.client.set_model_version_tag(self.name, version, key, value)

    def _followed(self) -> list[Event]:
        """Every event, once the aliases are what they say; goes on until none came in between."""
        while True:
            events = self.history()
            model = self._model()
            newest = str(events[-1].number) if events else None
            if newest == (model.tags.get(FOLLOWED_TAG) if model else None):
                return events
            self._set(CHAMPION, champion_of(events))
            self._set(CHALLENGER, challenger_of(events))
            self.client.set_registered_model_tag(self.name, FOLLOWED_TAG, newest)

    def _model(self) -> RegisteredModel | None:
        with unless_missing():
            return self.client.get_registered_model(self.name)
        return None

    def _alias(self, alias: str) -> str:
        model = self._model()
        return str(model.aliases.get(alias, "")) if model else ""

    def _set(self, alias: str, version: str) -> None:
        if self._alias(alias) == version:
            return
        if version and self.exists(version):
            self.client.set_registered_model_alias(self.name, alias, version)
        else:
            self.client.delete_registered_model_alias(self.name, alias)

    def _versions(self, name: str) -> list[ModelVersion]:
        found: list[ModelVersion] = []
        token = None
        while True:
            page = self.client.search_model_versions(f"name='{name}'", max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _ensure(self, name: str, text: str) -> None:
        try:
            self.client.create_registered_model(name, description=text)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def champion_of(events: Sequence[Event]) -> str:
    """The champion's version after these events; empty where there is none."""
    return next((event.after for event in reversed(events) if event.counts and event.kind in CHANGES), "")


def challenger_of(events: Sequence[Event]) -> str:
    """The version that was judged last against today's champion and waits behind it; empty where there is none."""
    for event in reversed(events):
        if event.counts and event.kind in CHANGES:
            return ""
        if event.counts:
            return event.version if event.kind in OPEN else ""
    return ""


def former_champions(events: Sequence[Event]) -> list[str]:
    """Versions that a rollback can go back to, the nearest first: each promotion adds one, each rollback takes one."""
    stack: list[str] = []
    for event in events:
        if not event.counts or event.kind not in CHANGES:
            continue
        if event.kind == "rolled back":
            while stack and stack[-1] != event.after:
                stack.pop()
        elif event.after:
            stack.append(event.after)
    return stack[-2::-1]


def actor() -> str:
    """Who acts: the Airflow run, or the person at this machine."""
    run = airflow_run()
    if run:
        return f"Airflow {run['dag_id']} {run['run_id']}"
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _arguments(package: Path) -> dict[str, Any]:
    """The package as arguments of `mlflow.pyfunc.log_model`."""
    from pipeline_steps.serving.pyfunc import TOP_K, columns_of

    about = json.loads((package / "about.json").read_text(encoding="utf-8"))
    listed = Array(Object([Property("label", DataType.string), Property("probability", DataType.double)]))
    one: tuple[Any, ...] = (DataType.string, DataType.double, listed)
    several: tuple[Any, ...] = (Array(DataType.string), Array(DataType.double), listed)
    outputs = [
        ColSpec(kind, name, required=False)
        for target in about["classes"]
        for kind, name in zip(
            several if target in about.get("multilabel", []) else one, columns_of(target), strict=True
        )
    ]
    return {
        "python_model": str(package / "model.py"),
        "code_paths": [str(path) for path in sorted((package / "code").iterdir())],
        "artifacts": {"package": str(package)},
        "pip_requirements": (package / "requirements.txt").read_text().split(),
        "signature": ModelSignature(
            Schema([ColSpec(AnyType(), "image")]),
            Schema([*outputs, ColSpec(DataType.string, "error", required=False)]),
            ParamSchema([ParamSpec("top_k", DataType.long, TOP_K)]),
        ),
        "input_example": _example(package),
    }


def _example(package: Path) -> Any:
    import base64

    import pandas as pd

    return pd.DataFrame({"image": [base64.b64encode((package / "example.jpg").read_bytes()).decode()]})


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """MLflow loads a model's code once when it logs it; the packages have names of their own, so nothing collides."""
    writes_none = sys.dont_write_bytecode
    sys.path.insert(0, str(folder.absolute()))
    sys.dont_write_bytecode = True  # else DVC would find the package changed
    try:
        yield
    finally:
        sys.path.remove(str(folder.absolute()))
        sys.dont_write_bytecode = writes_none
