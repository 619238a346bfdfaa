"""Airflow's trigger form, made from params.yaml, the recipes and the batches, and the params.yaml that a form asks for.

Airflow checks each field by its JSON schema. The fields are made so that whatever passes gives a valid params.yaml: no
value is right or wrong by what stands in another field.
"""

import difflib
import json
import re
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML

from pipeline_steps import params
from pipeline_steps.errors import PleatError
from pipeline_steps.params import Params
from pipeline_steps.params_models import CustomCnn, Training
from pipeline_steps.yaml_text import text_of, unshared

OWN = "params.yaml"  # stands in the field `recipe` for the checkout's own settings
FORM = "Trigger form"
AS_IN_RECIPE = "as in the recipe"
FEWEST_FOLDS, MOST_FOLDS = 2, 100
LARGEST_INTEGER = 2**53 - 1  # the browser sends a larger one rounded
# Python reads NaN and Infinity in JSON, and NaN passes every `minimum`, but nothing that is forbidden to be compared.
BY_MODEL = ("models", "training")  # blocks of params.yaml with a part for each model
FINITE = {"not": {"exclusiveMinimum": sys.float_info.max}}

Key = tuple[str, ...]


def fields(root: Path) -> dict[str, dict[str, Any]]:
    """The form's fields, each as the arguments of `airflow.sdk.Param`: default, texts and JSON schema.

    Args:
        root: the project's folder.

    Raises:
        PleatError: params.yaml or a recipe is wrong, or params.yaml lists a batch that is not in data/raw.
    """
    return _form(root, _recipes(root))


def document(root: Path, conf: Mapping[str, Any]) -> str:
    """The text of the params.yaml that a run with this configuration uses.

    The same project and configuration give the same text. A field that is absent has its default.

    Args:
        root: the project's folder.
        conf: values by the names of `fields`.

    Raises:
        PleatError: as `fields`, or `conf` names an unknown field or holds a value that a field does not take.
    """
    recipes = _recipes(root)
    form = _form(root, recipes)
    chosen = {name: field["default"] for name, field in form.items()} | dict(conf)
    for name in chosen:
        _expect(name in form, f"there is no field {reprlib.repr(name)}; the fields are {', '.join(form)}")
    recipe, batches, folds, epochs = (chosen[name] for name in ("recipe", "batches", "folds", "epochs"))
    names = [] if chosen["models"] is None else chosen["models"]
    overrides = {} if chosen["overrides"] is None else chosen["overrides"]
    _expect_known("recipe", [recipe], form["recipe"]["enum"])
    _expect_known("promote", [chosen["promote"]], form["promote"]["enum"])
    _expect_known("models", names, form["models"]["examples"])
    _expect_known("batches", batches, form["batches"]["examples"])

    settings = _read(root, recipe)
    experiment, training = settings["experiment"], settings["training"]
    experiment["batches"] = batches
    for name in names:
        if not _defines(recipes[recipe], name):
            donor = _read(root, next(other for other in recipes if _defines(recipes[other], name)))
            settings["models"][name], training[name] = donor["models"][name], donor["training"][name]
    experiment["models"] = names or experiment["models"]
    if folds is not None and not settings["split"]["given"]:
        experiment["folds"] = _whole_number("folds", folds, form["folds"])
    if epochs is not None:
        for name in experiment["models"]:
            training[name]["max_epochs"] = _whole_number("epochs", epochs, form["epochs"])
    if chosen["promote"] != AS_IN_RECIPE:
        settings["promotion"]["mode"] = chosen["promote"]
    _override(settings, overrides, _keys(recipes))
    experiment["folds"] = params.check(settings, FORM).experiment.folds  # a number of folds became their list
    return text_of(unshared(settings))


def _recipes(root: Path) -> dict[str, Params]:
    """The checkout's own settings and every recipe, checked."""
    names = sorted(path.stem for path in (root / "recipes").glob("*.yaml"))
    return {name: params.load(_path(root, name)) for name in (OWN, *names)}


def _path(root: Path, recipe: str) -> Path:
    return root / OWN if recipe == OWN else root / "recipes" / f"{recipe}.yaml"


def _read(root: Path, recipe: str) -> Any:
    """A recipe as it stands in its file, keys in their order and nothing shared between two places."""
    return unshared(YAML(typ="safe").load(_path(root, recipe).read_text(encoding="utf-8")))


def _defines(recipe: Params, model: str) -> bool:
    return model in recipe.models and model in recipe.training


def _models(recipes: Mapping[str, Params]) -> list[str]:
    """Every model that some recipe defines completely and that any recipe may train, in the order they are met in."""
    names = dict.fromkeys(name for each in recipes.values() for name in each.models if _defines(each, name))
    multiclass = any(target.kind == "multiclass" for each in recipes.values() for target in each.targets.values())
    return [name for name in names if not (multiclass and "asymmetric" in _losses(recipes, name))]


def _losses(recipes: Mapping[str, Params], model: str) -> set[str]:
    """The kinds of loss that the recipes train a model with."""
    return {each.training[model].loss.kind for each in recipes.values() if model in each.training}


def _batches(root: Path) -> list[str]:
    """The batches in data/raw: folders, and those of which only the .dvc file is there."""
    raw = root / "data" / "raw"
    there = {path.name for path in raw.glob("*") if path.is_dir()} | {path.stem for path in raw.glob("*.dvc")}
    return sorted(filter(_is_name, there))


def _is_name(name: str) -> bool:
    try:
        TypeAdapter(params.Name).validate_python(name)
    except ValidationError:
        return False
    return True


def _form(root: Path, recipes: Mapping[str, Params]) -> dict[str, dict[str, Any]]:
    own, models, batches = recipes[OWN].experiment, _models(recipes), _batches(root)
    for batch in own.batches:
        if batch not in batches:
            raise PleatError(
                f"{root / OWN} lists the batch '{batch}', but {root / 'data' / 'raw'} holds neither a folder {batch} "
                f"nor {batch}.dvc; bring it with `pleat data add SOURCE --name {batch}`, or take it off the list."
            )
    keys = _keys(recipes)
    epochs = keys["training", models[0], "max_epochs"]
    return {
        "recipe": {
            "default": OWN,
            "title": "Recipe",
            "description": "Settings to start from: the project's own params.yaml, or a file of recipes/.",
            "type": "string",
            "enum": list(recipes),
            "values_display": {OWN: f"{OWN} (the project's own, from recipe {own.recipe})"},
        },
        "models": {
            "default": [],
            "title": "Models",
            "description": "Which models are trained and compared; none chosen: those of the recipe. A model that the "
            "recipe does not define is taken from params.yaml or from the first recipe that does.",
            "type": ["array", "null"],  # the form sends null when all are taken away
            "items": {"type": "string", "enum": models},
            "uniqueItems": True,
            "examples": models,
        },
        "folds": {
            "default": None,
            "title": "Folds",
            "description": f"Number of folds of the cross-validation, {FEWEST_FOLDS} to {MOST_FOLDS}; empty: as in the "
            "recipe. A recipe that takes the data set's own lists for train and val keeps its one.",
            "type": ["integer", "null"],
            "minimum": FEWEST_FOLDS,
            "maximum": MOST_FOLDS,
        },
        "epochs": {
            "default": None,
            "title": "Epochs",
            "description": "Largest number of epochs, for every model of the run; empty: as in the recipe.",
            **epochs,
            "type": ["integer", "null"],
        },
        "batches": {
            "default": list(own.batches),
            "title": "Data batches",
            "description": "Which batches of data/raw the run uses. Data belongs to the project, not to a recipe: the "
            "default is what params.yaml lists, whichever recipe is chosen.",
            "type": "array",
            "items": {"type": "string", "enum": batches},
            "minItems": 1,
            "uniqueItems": True,
            "examples": batches,
        },
        "promote": {
            "default": AS_IN_RECIPE,
            "title": "Promotion",
            "description": "auto: a model shown to be better becomes champion; approve: a person is asked first; "
            "dry_run: it is judged, nothing is registered.",
            "type": "string",
            "enum": [AS_IN_RECIPE, *get_args(params.Promotion.model_fields["mode"].annotation)],
        },
        "overrides": {
            "default": {},
            "title": "Single settings",
            "description_md": _help(keys),
            "type": ["object", "null"],  # null: the editor was emptied
            **_rules(keys),
            # Airflow shows a refused value with the schema that refused it; `False` would show all of the keys'.
            "additionalProperties": {"not": {"description": "any value: there is no such key"}},
        },
    }


def _rules(keys: Mapping[Key, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Keywords of a JSON schema that say what each key takes; what several models share is said once.

    Airflow checks the schema itself whenever it reads the DAG and at the start of every task, so its size counts.
    """
    properties = {".".join(key): schema for key, schema in keys.items() if key[0] not in BY_MODEL}
    shared: dict[tuple[str, str, str], list[str]] = {}  # models by block, setting and what it takes
    for key, schema in keys.items():
        if key[0] in BY_MODEL:
            block, model, *setting = key
            shared.setdefault((block, ".".join(setting), json.dumps(schema)), []).append(model)
    patterns = {
        rf"^{block}\.({'|'.join(map(re.escape, models))})\.{re.escape(setting)}$": json.loads(schema)
        for (block, setting, schema), models in shared.items()
    }
    return {"properties": properties, "patternProperties": patterns}


def _help(keys: Iterable[Key]) -> str:
    """What may stand in `overrides`; what all of several models have is told once.

    No word is marked as code, because Airflow sets such words in boxes that cover the line above.
    """
    models_with: dict[Key, list[str]] = {}
    for block, *below in keys:
        models = [below[0]] if block in BY_MODEL else []
        pattern = (f"{block}.MODEL.", ".".join(below[1:])) if models else ("", ".".join((block, *below)))
        models_with.setdefault(pattern, []).extend(models)
    names_of: dict[Key, list[str]] = {}
    for (prefix, name), models in models_with.items():
        names_of.setdefault((prefix, ", ".join(models)), []).append(name)
    listing = [
        f"- **{prefix}** with {', '.join(names)}; MODEL is one of {models}" if prefix else f"- {', '.join(names)}"
        for (prefix, models), names in names_of.items()
    ]
    return "\n".join(
        [
            'Settings of params.yaml by dotted key, such as {"training.cnn_small.patience": 5, "experiment.seed": 3}. '
            "They win over the fields above; those of models that are not part of the run do nothing. On a DAG's own "
            "page Chrome loses each typed g to a shortcut of Airflow's: paste, or trigger from the list of DAGs. "
            "The keys:",
            "",
            *listing,
        ]
    )


def _keys(recipes: Mapping[str, Params]) -> dict[Key, dict[str, Any]]:
    """Every key that may be overridden, with the JSON schema of its values."""
    keys = dict(_leaves(Params.model_json_schema()))
    # Runs do not look at the inbox; the number of folds depends on `split.given`.
    keys = {key: schema for key, schema in keys.items() if key[0] != "inbox" and key != ("split", "given")}
    of_training = dict(_leaves(Training.model_json_schema()))
    del of_training["devices",]  # belongs to the machine
    for name in _models(recipes):
        definitions = [each.models[name] for each in recipes.values() if name in each.models]
        # Where recipes mean different kinds of model by one name, only what all kinds share can be changed.
        first, *others = (dict(_leaves(type(each).model_json_schema())) for each in definitions)
        shared = {key: schema for key, schema in first.items() if all(other.get(key) == schema for other in others)}
        cnns = [each for each in definitions if isinstance(each, CustomCnn)]
        if len(cnns) == len(definitions):
            size = shared["input_size",]
            size["minimum"] = max(size["minimum"], *(cnn.smallest_input for cnn in cnns))
        else:
            shared.pop(("input_size",), None)  # which sizes a timm network takes, only timm knows
        keys |= {("models", name, *key): schema for key, schema in shared.items()}
        training = dict(of_training)
        if any(each.kind == "frozen" for each in definitions):  # only pixels can be augmented
            training = {key: schema for key, schema in training.items() if key[0] != "augment"}
        if _losses(recipes, name) != {"cross_entropy"}:  # no other loss takes it
            del training["label_smoothing",]
        keys |= {("training", name, *key): schema for key, schema in training.items()}
    return keys


def _leaves(schema: Mapping[str, Any], above: Key = ()) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Yields the keys of a block whose values can be judged by themselves.

    Free text (a path, a timm name, the holdout's salt) is none of them, because nothing can be said about it here; nor
    are lists and blocks, on which other keys depend.
    """
    definitions = schema.get("$defs", {})
    for name, below in schema["properties"].items():
        block = definitions.get(below.get("$ref", "").rpartition("/")[2], below)
        if "properties" in block:
            yield from _leaves({"$defs": definitions, **block}, (*above, name))
        elif judged := _scalar(block):
            yield (*above, name), judged


def _scalar(schema: dict[str, Any]) -> dict[str, Any] | None:
    """What JSON schema says of one value; None where that is not enough to tell right from wrong."""
    known = [_choices(branch) for branch in schema.get("anyOf", [schema])]
    if all(known):
        choices = [choice for branch in known for choice in branch]
        return {"enum": choices} if len(choices) > 1 else None
    bare = {keyword: value for keyword, value in schema.items() if keyword != "title"}
    return {
        "boolean": bare,
        "integer": {"maximum": LARGEST_INTEGER} | bare,
        "number": bare | FINITE,
    }.get(schema.get("type", ""))


def _choices(schema: Mapping[str, Any]) -> list[Any]:
    if schema.get("type") == "null":
        return [None]
    return [schema["const"]] if "const" in schema else schema.get("enum", [])


def _override(settings: Any, overrides: Any, keys: Mapping[Key, Any]) -> None:
    _expect(
        isinstance(overrides, Mapping), f"`overrides` must be keys with their values, but got {reprlib.repr(overrides)}"
    )
    by_name = {".".join(key): key for key in keys}
    for name, value in overrides.items():
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=1)
            hint = f"the nearest is `{near[0]}`" if near else f"it can change {', '.join(by_name)}"
            raise PleatError(f"{FORM}: `overrides` cannot change {name!r}; {hint}.")
        *above, last = by_name[name]
        block = settings
        for depth, part in enumerate(above):
            # A model that this run does not know changes nothing; a block that may be left out is put in.
            a_model = depth == 1 and above[0] in BY_MODEL
            block = block.get(part, {}) if a_model else block.setdefault(part, {})
        block[last] = _whole(value) if keys[by_name[name]].get("type") == "integer" else value


def _whole(value: Any) -> Any:
    """JSON knows no difference between 3.0 and 3; params.yaml does."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _whole_number(field: str, value: Any, schema: Mapping[str, Any]) -> int:
    least, most, number = schema["minimum"], schema["maximum"], _whole(value)
    fine = type(number) is int and least <= number <= most
    _expect(fine, f"`{field}` must be a whole number from {least} to {most}, but got {reprlib.repr(value)}")
    return int(number)


def _expect_known(field: str, values: Any, known: list[str]) -> None:
    _expect(isinstance(values, list), f"`{field}` must be a list, but got {reprlib.repr(values)}")
    for value in values:
        _expect(value in known, f"`{field}` names {reprlib.repr(value)}; there are {', '.join(known)}")


def _expect(fine: bool, sentence: str) -> None:
    if not fine:
        raise PleatError(f"{FORM}: {sentence}.")
