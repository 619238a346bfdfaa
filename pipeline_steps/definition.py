"""dvc.yaml as stages, their instances and the edges between them, read without DVC so that it takes milliseconds.

It understands what DVC's own parser makes of `matrix` and `${...}`; tests compare it with DVC's graph.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML

from pipeline_steps.errors import PleatError

REFERENCE = re.compile(r"\$\{\s*([^}\s]+)\s*\}")


@dataclass(frozen=True)
class Instance:
    """One run of a stage: DVC's address of it, what it reads and what it writes (paths below the project)."""

    address: str
    item: dict[str, str | int]
    deps: tuple[str, ...]
    outs: tuple[str, ...]

    @property
    def title(self) -> str:
        """The item in words: `cnn_small · fold 2`."""
        words = (value if isinstance(value, str) else f"{key} {value}" for key, value in self.item.items())
        return " · ".join(words)


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml with its instances; one without a matrix has a single instance."""

    name: str
    text: str
    command: str
    matrix: tuple[str, ...]
    meta: dict[str, Any]
    instances: tuple[Instance, ...]


def read(root: Path, params: Mapping[str, Any]) -> dict[str, Stage]:
    """The stages of dvc.yaml by name, in the file's order.

    Args:
        root: the project's or a workspace's folder.
        params: the contents of params.yaml.

    Raises:
        PleatError: dvc.yaml is absent or uses a template that is not understood here.
    """
    try:
        document = YAML(typ="safe").load((root / "dvc.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PleatError(f"{root / 'dvc.yaml'} does not exist; Airflow's DAGs are built from it.") from None
    return {name: _stage(name, entry, params) for name, entry in document["stages"].items()}


def edges(stages: Mapping[str, Stage]) -> set[tuple[str, str]]:
    """Which stage feeds which, as (from, to): an output lies at, in or above a dependency of the other."""
    return {
        (source.name, target.name)
        for source, target in itertools.permutations(stages.values(), 2)
        if any(_feeds(one, other) for one in source.instances for other in target.instances)
    }


def predecessors(stages: Mapping[str, Stage], address: str) -> list[str]:
    """Addresses of the instances whose outputs one instance reads."""
    every = [instance for stage in stages.values() for instance in stage.instances]
    target = next(instance for instance in every if instance.address == address)
    return [source.address for source in every if source is not target and _feeds(source, target)]


def sources(stages: Mapping[str, Stage]) -> list[str]:
    """What is read but written by no stage: raw batches, code, expectations."""
    every = [instance for stage in stages.values() for instance in stage.instances]
    outs = [out for instance in every for out in instance.outs]
    deps = dict.fromkeys(dep for instance in every for dep in instance.deps)
    return [dep for dep in deps if not any(_overlap(dep, out) for out in outs)]


def _stage(name: str, entry: Mapping[str, Any], params: Mapping[str, Any]) -> Stage:
    unknown = {"foreach", "vars", "wdir"} & set(entry)
    if unknown:
        raise PleatError(f"dvc.yaml: stage '{name}' uses `{min(unknown)}`, which Airflow's DAG does not understand.")
    matrix = {key: _resolved(values, params, name) for key, values in entry.get("matrix", {}).items()}
    instances = []
    for values in itertools.product(*matrix.values()):
        item = dict(zip(matrix, values, strict=True))
        address = f"{name}@{'-'.join(map(str, values))}" if matrix else name
        scope = {**params, "item": item}
        deps = _paths(entry.get("deps", []), scope, name)
        kinds = ("outs", "metrics", "plots")
        outs = [path for kind in kinds for path in _paths(entry.get(kind, []), scope, name)]
        instances.append(Instance(address, item, tuple(deps), tuple(outs)))
    text, command = entry.get("desc", ""), str(entry.get("cmd", ""))
    return Stage(name, text, command, tuple(matrix), dict(entry.get("meta") or {}), tuple(instances))


def _paths(entries: list[Any], scope: Mapping[str, Any], stage: str) -> list[str]:
    paths = (next(iter(entry)) if isinstance(entry, Mapping) else entry for entry in entries)
    return [str(PurePosixPath(str(_resolved(path, scope, stage)))) for path in paths]


def _resolved(value: Any, scope: Mapping[str, Any], stage: str) -> Any:
    """`value` with every `${a.b}` replaced; a value that is one reference alone keeps its type."""
    if not isinstance(value, str):
        return value
    whole = REFERENCE.fullmatch(value)
    if whole:
        return _look_up(whole[1], scope, stage)
    return REFERENCE.sub(lambda found: str(_look_up(found[1], scope, stage)), value)


def _look_up(key: str, scope: Mapping[str, Any], stage: str) -> Any:
    value: Any = scope
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise PleatError(f"dvc.yaml: stage '{stage}' refers to `{key}`, which params.yaml does not hold.")
        value = value[part]
    return value


def _feeds(source: Instance, target: Instance) -> bool:
    return any(_overlap(out, dep) for out in source.outs for dep in target.deps)


def _overlap(one: str, other: str) -> bool:
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")
