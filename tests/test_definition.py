"""dvc.yaml as Airflow's DAG sees it, against DVC's own reading of the same file."""

import random
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, document
from dvc.repo import Repo
from ruamel.yaml import YAML
from workspace import check

from pipeline_steps import definition
from pipeline_steps.errors import PleatError


def write(root: Path, stages: dict[str, Any], params: dict[str, Any]) -> dict[str, definition.Stage]:
    YAML().dump({"stages": stages}, root / "dvc.yaml")
    YAML().dump(params, root / "params.yaml")
    return definition.read(root, params)


def compare(root: Path, stages: dict[str, definition.Stage]) -> None:
    """Instances, edges, dependencies and outputs must be DVC's."""
    with Repo(str(root)) as repo:
        nodes = {node.addressing: node for node in repo.index.graph if not node.addressing.endswith(".dvc")}
        instances = {one.address: one for stage in stages.values() for one in stage.instances}
        assert set(instances) == set(nodes)
        for address, node in nodes.items():
            assert sorted(instances[address].outs) == sorted(out.def_path for out in node.outs)
            files = [dep.def_path for dep in node.deps if not hasattr(dep, "params")]
            assert sorted(instances[address].deps) == sorted(files)
            before = [other.addressing for other in repo.index.graph.successors(node)]
            assert sorted(definition.predecessors(stages, address)) == sorted(
                name for name in before if not name.endswith(".dvc")
            )
        pairs = [(source.addressing, target.addressing) for target, source in repo.index.graph.edges]
        names = {tuple(address.partition("@")[0] for address in pair) for pair in pairs if set(pair) <= set(nodes)}
        assert definition.edges(stages) == names


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    check(tmp_path, "dvc", "init", "--no-scm", "--quiet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"experiment.models": ["cnn_tiny"], "experiment.folds": [0, 1]},
        {"experiment.batches": ["sample", "sample_2"], "experiment.folds": list(range(11))},
    ],
)
def test_the_pipeline_is_read_as_dvc_reads_it(root: Path, settings: dict[str, Any]) -> None:
    (root / "dvc.yaml").write_bytes((REPOSITORY / "dvc.yaml").read_bytes())
    params = document(settings)
    YAML().dump(params, root / "params.yaml")
    compare(root, definition.read(root, params))


@pytest.mark.parametrize("seed", range(8))
def test_random_pipelines_are_read_as_dvc_reads_them(root: Path, seed: int) -> None:
    draw = random.Random(seed)
    params = {"lists": {"a": ["x", "y.z"], "b": [0, 1, 2]}, "name": "n"}
    stages: dict[str, Any] = {}
    written: list[str] = ["source"]
    for number in range(draw.randint(2, 7)):
        matrix = draw.choice([{}, {"a": "${lists.a}"}, {"a": "${lists.a}", "b": "${lists.b}"}, {"b": [5, 7]}])
        place = "/".join(f"${{item.{key}}}" for key in matrix) or "all"
        outs = [f"out/{number}/{place}/file", {f"extra_{number}/${{name}}/{place}": {"cache": False}}]
        # A dependency is a whole folder of another stage's outputs, or something inside one of them.
        deps = [path + draw.choice(["", "/inside"]) for path in draw.sample(written, draw.randint(1, len(written)))]
        entry = {"cmd": "true", "deps": sorted(set(deps)), "outs": outs[: draw.randint(1, 2)]}
        stages[f"stage{number}"] = {**entry, "matrix": matrix} if matrix else entry
        written += [f"out/{number}", f"extra_{number}/n"][: len(entry["outs"])]
    compare(root, write(root, stages, params))


def test_titles_say_what_an_item_is() -> None:
    stages = definition.read(REPOSITORY, document())
    assert [one.title for one in stages["train"].instances][:2] == ["cnn_small · fold 0", "cnn_small · fold 1"]
    assert stages["prepare"].instances[1].title == "cnn_tiny · sample"


def test_sources_are_what_no_stage_writes() -> None:
    found = definition.sources(definition.read(REPOSITORY, document()))
    assert "data/raw/sample" in found
    assert all((REPOSITORY / path).exists() for path in found)
    assert not [path for path in found if path.startswith(("data/ingest", "data/train", "reports"))]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"cmd": "x", "foreach": ["a"]}, "uses `foreach`"),
        ({"cmd": "x", "deps": ["${nothing.here}"]}, "`nothing.here`, which params.yaml does not hold"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, stage: dict[str, Any], message: str) -> None:
    with pytest.raises(PleatError, match=message):
        write(tmp_path, {"odd": stage}, {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PleatError, match=r"dvc\.yaml does not exist"):
        definition.read(tmp_path, {})
