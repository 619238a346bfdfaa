"""The DAG `pleat_train` without servers: import, edges, form, `dag.test()`, what is retried and what is not."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, content
from dvc.repo import Repo
from workspace import check, copy_checkout, environment, use_quick

from pipeline_steps import trigger_form

DECISION = ("needs_approval", "approve", "decide")  # what a person is asked after the pipeline's last stage
HEAVY = (
    "torch",
    "mlflow",
    "great_expectations",
    "dvc",
    "pandas",
    "sklearn",
    "timm",
    "boto3",
    "airflow.providers.amazon.aws",
)


def python(folder: Path, code: str, **more: str) -> str:
    """Runs code with the DAGs of a project importable; gives back what it printed."""
    paths = os.pathsep.join([str(folder / "dags"), str(folder)])
    settings = {"PYTHONPATH": paths, "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "AIRFLOW__CORE__UNIT_TEST_MODE": "False"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=folder, capture_output=True, text=True, timeout=600,
        env=environment() | settings | {"AIRFLOW__CORE__DAGS_FOLDER": str(folder / "dags")} | more, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AIRFLOW_HOME with its database and the pool."""
    home = tmp_path_factory.mktemp("airflow")
    check(home, "airflow", "db", "migrate", AIRFLOW_HOME=str(home))
    check(home, "airflow", "pools", "set", "gpu", "1", "devices", AIRFLOW_HOME=str(home))
    return home


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with its own cache and the settings of the fixture `finished`."""
    folder = copy_checkout(tmp_path_factory.mktemp("project"))
    use_quick(folder)
    return folder


def test_importing_a_dag_takes_less_than_a_second_and_pulls_in_nothing_heavy(home: Path) -> None:
    dags = [path.stem for path in (REPOSITORY / "dags").glob("pleat_*.py") if path.stem != "pleat_operators"]
    assert "pleat_train" in dags
    for dag in dags:
        code = f"""
            import sys, time
            import airflow.sdk, airflow.sdk.definitions.decorators  # the part that is Airflow's own
            from airflow.sdk import DAG, BaseOperator, Param, task
            started = time.process_time()
            import {dag}
            print(time.process_time() - started, *[name for name in {HEAVY!r} if name in sys.modules])
        """
        seconds, *heavy = python(REPOSITORY, code, AIRFLOW_HOME=str(home)).split()
        assert float(seconds) < 1  # of the processor, so that it does not matter what else the machine does
        assert heavy == []


def test_the_form_is_told_once(home: Path) -> None:
    """Airflow checks and stores every copy: tasks that carry one make each reading of the file take four seconds."""
    code = """
        import json
        from pleat_train import dag
        from airflow.serialization.serialized_objects import DagSerialization
        text = json.dumps(DagSerialization.to_dict(dag))
        shown = list(dag.params), text.count('"uniqueItems"'), text.count("patternProperties")
        print(json.dumps([*shown, {t.task_id: list(t.params) for t in dag.tasks if t.params}]))
    """
    fields, lists, patterns, of_tasks = json.loads(python(REPOSITORY, code, AIRFLOW_HOME=str(home)))
    assert fields == list(trigger_form.fields(REPOSITORY))
    assert (lists, patterns) == (2, 1)
    assert of_tasks == {"approve": ["comment"]}


def test_dags_use_airflows_task_sdk_alone() -> None:
    for path in (REPOSITORY / "dags").glob("*.py"):
        lines = [line.split() for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        airflow = [words[1] for words in lines if words[1].split(".")[0] == "airflow"]
        person = "airflow.providers.standard.operators.hitl"  # the one operator that is not of the SDK: asking a person
        assert all(name.startswith("airflow.sdk") or name == person for name in airflow), path


def test_the_edges_are_dvcs(home: Path, project: Path) -> None:
    code = """
        import json
        from pleat_train import dag
        print(json.dumps({task.task_id: sorted(task.downstream_task_ids) for task in dag.tasks}))
    """
    downstream = json.loads(python(project, code, AIRFLOW_HOME=str(home)))
    with Repo(str(project)) as repo:
        stages = {node.name: node for node in repo.index.graph if not node.path.endswith(".dvc")}
        edges = {
            (source.name.partition("@")[0], target.name.partition("@")[0])
            for target, source in repo.index.graph.edges
            if source in stages.values()
        }
    names = {name.partition("@")[0] for name in stages}
    matrix = {name.partition("@")[0] for name in stages if "@" in name}
    assert set(downstream) == names | {"setup"} | {f"list_{name}" for name in matrix} | set(DECISION)
    found = {(task, after) for task in names for after in downstream[task] if after in names}
    assert found == edges
    assert downstream["register"] == ["needs_approval"]
    assert [downstream[task] for task in DECISION] == [["approve"], ["decide"], []]
    # Every stage needs the run's description, but only what would else come first is drawn behind it.
    roots = names - {target for _, target in edges}
    assert set(downstream["setup"]) == {f"list_{name}" for name in matrix} | roots - matrix
    for name in matrix:
        assert downstream[f"list_{name}"] == [name]


def test_tasks_say_what_they_are(home: Path, project: Path) -> None:
    code = """
        import json
        from pleat_train import dag
        print(json.dumps({t.task_id: [t.doc_md, t.owner, t.pool, t.retries] for t in dag.tasks}), bool(dag.doc_md))
    """
    printed = python(project, code, AIRFLOW_HOME=str(home)).strip()
    assert printed.endswith("True")
    tasks = json.loads(printed.removesuffix("True"))
    assert all(text and owner == "pleat" and retries > 0 for text, owner, _, retries in tasks.values())
    assert "pleat train" in tasks["train"][0]
    assert {name for name, (*_, pool, _) in tasks.items() if pool == "gpu"} == {"prepare", "train", "refit", "compress"}


TEST_RUN = """
    import json
    from pleat_train import dag
    run = dag.test(run_conf={conf!r})
    tasks = run.get_task_instances()
    states = {{f"{{t.task_id}}[{{t.map_index}}]": [str(t.state), t.rendered_map_index] for t in tasks}}
    print("RESULT" + json.dumps([str(run.state), states]))
"""


def dag_test(project: Path, home: Path, conf: dict[str, Any]) -> tuple[str, dict[str, list[str]], str]:
    """Runs the DAG in one process: the run's state, each task's state and title, and all that was printed."""
    printed = python(project, TEST_RUN.format(conf=conf), AIRFLOW_HOME=str(home))
    state, states = json.loads(printed.rpartition("RESULT")[2])
    return state, states, printed


def test_a_run_gives_what_dvc_repro_gives(home: Path, project: Path, finished: Path) -> None:
    before = content(project / "pipeline_steps") | {"params": (project / "params.yaml").read_bytes()}
    state, states, log = dag_test(project, home, {"models": ["cnn_tiny"]})
    assert state == "success"
    assert {name for name, (state, _) in states.items() if state != "success"} == {"approve[-1]", "decide[-1]"}
    assert states["approve[-1]"][0] == states["decide[-1]"][0] == "skipped"  # nothing waits for a person
    assert [states[f"train[{fold}]"][1] for fold in range(2)] == [f"cnn_tiny · fold {fold}" for fold in range(2)]
    assert states["prepare[0]"][1] == "cnn_tiny · sample"
    assert "cnn_tiny fold 1: epoch 2/4" in log  # the stage's own lines
    assert "data version  sample=" in log
    assert "max_epochs: 4" in log
    # The checkout stays as it was; the run has a workspace of its own.
    after = {name: data for name, data in content(project / "pipeline_steps").items() if name in before}
    assert after | {"params": (project / "params.yaml").read_bytes()} == before
    assert not (project / "data" / "train").exists()
    [workspace] = (project / ".pleat" / "runs").glob("pleat_train-*")
    # The same bytes as `dvc repro` in another checkout with a cache of its own.
    for folder in ("data/train/cnn_tiny", "data/evaluate/cnn_tiny", "data/split", "data/validate"):
        assert content(workspace / folder) == content(finished / folder)
    ours, theirs = (json.loads((root / "reports/leaderboard.json").read_text()) for root in (workspace, finished))
    assert ours["cnn_tiny"] == theirs["cnn_tiny"]


def test_bad_data_is_not_tried_again(home: Path, project: Path) -> None:
    # Rare classes of the sample have fewer images than that, which only the data can tell.
    state, states, log = dag_test(project, home, {"models": ["cnn_tiny"], "folds": 90})
    assert state == "failed"
    assert states["split[-1]"][0] == "failed"
    assert states["train[-1]"][0] == "upstream_failed"
    assert "AirflowFailException: " in log
    assert log.count("> pleat split") == 1


STEP = """
    import sys
    from pleat_operators import StepOperator
    from airflow.sdk.exceptions import AirflowException, AirflowFailException
    operator = StepOperator(task_id="x")
    try:
        operator.step({{"run_id": "r", "ti": None}}, {order!r})
    except AirflowFailException as error:
        print("NEVER AGAIN", error)
    except AirflowException as error:
        print("AGAIN", error)
"""


def test_a_wrong_setting_is_not_tried_again(home: Path, project: Path) -> None:
    code = STEP.format(order={"do": "setup", "conf": {"foldz": 3}, "by_hand": True})
    assert "NEVER AGAIN" in python(project, code, AIRFLOW_HOME=str(home))


def test_a_step_that_was_killed_is_tried_again(home: Path, project: Path) -> None:
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    (project / "sitecustomize.py").write_text(f"import sys\nif sys.orig_argv[3:4] == ['pipeline_steps.step']: {kill}\n")
    printed = python(project, STEP.format(order={"do": "setup", "conf": {}, "by_hand": True}), AIRFLOW_HOME=str(home))
    (project / "sitecustomize.py").unlink()
    assert "AGAIN The step was ended (exit status 137)" in printed
    assert "NEVER" not in printed
