"""Whatever the trigger form accepts gives a valid params.yaml: values drawn from its schemas, and from anywhere."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from trigger_projects import Form, override_keys, read, refusal, yaml_1_1

from pipeline_steps import params, trigger_form
from pipeline_steps.errors import PleatError

pytest_plugins = ["trigger_projects"]


def check_document(project: Path, form: Form, conf: Mapping[str, Any]) -> None:
    """Checks a run's params.yaml against what its configuration says, as far as that can be read off directly."""
    text = trigger_form.document(project, conf)
    found = read(text)
    assert yaml_1_1(text) == found
    loaded = params.check(found, "params.yaml")
    recipe = conf.get("recipe", "params.yaml")
    source = params.load(project / (recipe if recipe == "params.yaml" else f"recipes/{recipe}.yaml")).experiment
    chosen = loaded.experiment
    assert chosen.recipe == source.recipe
    assert chosen.models == (conf.get("models") or source.models)
    assert chosen.batches == conf.get("batches", form["batches"]["default"])
    ask = conf.get("folds") and not loaded.split.given
    assert chosen.folds == (list(range(int(conf["folds"]))) if ask else source.folds)
    overrides = conf.get("overrides") or {}
    for model in chosen.models:
        if conf.get("epochs"):
            expected = overrides.get(f"training.{model}.max_epochs", conf["epochs"])
            assert loaded.training[model].max_epochs == expected
    for key, value in overrides.items():
        block, *below = key.split(".")
        name = next((name for name in form["models"]["examples"] if key.startswith(f"{block}.{name}.")), None)
        node = found[block]
        if name:
            if name not in node:
                assert name not in chosen.models
                continue
            node, below = node[name], key.removeprefix(f"{block}.{name}.").split(".")
        for part in below:
            node = node[part]
        assert node == value


def fitting(rule: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a schema of the form accepts."""
    if "enum" in rule:
        return st.sampled_from(rule["enum"])
    kinds = rule["type"] if isinstance(rule["type"], list) else [rule["type"]]
    least, most = rule.get("minimum"), rule.get("maximum")
    if "integer" in kinds:
        if "exclusiveMaximum" in rule:
            most = rule["exclusiveMaximum"] - 1
        whole = st.integers(least, most)
        values = whole | whole.map(float)
    elif "number" in kinds:
        values = st.floats(
            rule.get("exclusiveMinimum", least),
            rule.get("exclusiveMaximum", most),
            exclude_min="exclusiveMinimum" in rule,
            exclude_max="exclusiveMaximum" in rule,
            allow_nan=False,
            allow_infinity=False,
        )
    elif "boolean" in kinds:
        values = st.booleans()
    elif "array" in kinds:
        values = st.lists(fitting(rule["items"]), min_size=rule.get("minItems", 0), unique=True)
    else:
        known = override_keys({"overrides": rule})
        keys = st.lists(st.sampled_from(sorted(known)), unique=True, max_size=8)
        values = keys.flatmap(lambda chosen: st.fixed_dictionaries({k: fitting(known[k]) for k in chosen}))
    return values | st.none() if "null" in kinds else values


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([2**32, 10**400, 1e308, 3.0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_whatever_the_schemas_accept_gives_a_valid_params_yaml(either: Path, form: Form, data: st.DataObject) -> None:
    conf = data.draw(st.fixed_dictionaries({}, optional={name: fitting(field) for name, field in form.items()}))
    assert not refusal(form, conf)
    check_document(either, form, conf)


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_values_from_anywhere_are_used_or_refused_in_a_sentence(either: Path, form: Form, data: st.DataObject) -> None:
    known = override_keys(form)
    wild = {
        name: ANYTHING | st.lists(st.sampled_from(field.get("examples", form["recipe"]["enum"])), max_size=3)
        for name, field in form.items()
    }
    wild["overrides"] = ANYTHING | st.dictionaries(st.sampled_from(sorted(known)) | st.text(), ANYTHING, max_size=3)
    conf = data.draw(st.fixed_dictionaries({}, optional=wild))
    if refusal(form, conf):
        with suppress(PleatError):
            trigger_form.document(either, conf)
    else:
        check_document(either, form, conf)
