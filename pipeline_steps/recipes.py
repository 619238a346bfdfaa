"""`pleat use`: puts a recipe in place as params.yaml, with values changed on the way."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from pipeline_steps import params
from pipeline_steps.errors import PleatError
from pipeline_steps.files import write_text
from pipeline_steps.params import Params
from pipeline_steps.progress import say
from pipeline_steps.yaml_text import round_trip, text_of, unshared

MAX_FOLDS = 1000


def use(recipe: str, overrides: list[str], root: Path = Path()) -> None:
    """Writes params.yaml from recipes/RECIPE.yaml; everything is checked before the file is touched.

    Args:
        recipe: the name of a file in recipes/, without its suffix.
        overrides: `KEY=VALUE` each, where KEY is a dotted key of the recipe, or one that it may leave out, and VALUE is
            YAML.
        root: the project's folder.

    Raises:
        PleatError: the recipe or a key does not exist, a value is not what its key takes, or a weights file is absent.
    """
    path = _find(recipe, root)
    text = path.read_text(encoding="utf-8")
    optional = list(_optional(params.load(path)))
    document = round_trip().load(text)
    if overrides:
        _unshare(document, set())
    for override in overrides:
        _override(document, override, optional, recipe, root)
    if _list_folds(document) or overrides:
        text = text_of(document)
    where = f"{path} with --set {' '.join(overrides)}" if overrides else str(path)
    chosen = params.check(YAML(typ="safe").load(text), where).experiment
    write_text(root / "params.yaml", text)

    say(f"params.yaml now holds the recipe '{recipe}'{': ' if overrides else ''}{', '.join(overrides)}")
    say(f"  batches: {', '.join(chosen.batches)}")
    say(f"  models:  {', '.join(chosen.models)}")
    say(f"  folds:   {len(chosen.folds)}")
    for batch in chosen.batches:
        _warn_if_absent(batch, root)


def _list_folds(document: CommentedMap) -> bool:
    """Turns a number of folds into their list, which the matrix of dvc.yaml needs."""
    experiment = document["experiment"]
    count = experiment.get("folds") if isinstance(experiment, dict) else None
    if not isinstance(count, int) or isinstance(count, bool):
        return False
    if count > MAX_FOLDS:
        raise PleatError(f"Expected experiment.folds to be at most {MAX_FOLDS}, but got {count}.")
    experiment["folds"] = unshared(list(range(count)))
    return True


def _find(recipe: str, root: Path) -> Path:
    known = sorted(path.stem for path in (root / "recipes").glob("*.yaml"))
    if recipe not in known:
        there = f"there are {', '.join(known)}" if known else f"{root / 'recipes'} holds none"
        raise PleatError(f"There is no recipe '{recipe}'; {there}.")
    return root / "recipes" / f"{recipe}.yaml"


def _warn_if_absent(batch: str, root: Path) -> None:
    folder = root / "data" / "raw" / batch
    if folder.is_dir():
        return
    tracked = folder.with_name(f"{batch}.dvc").is_file()
    remedy = "`dvc pull` fetches it" if tracked else f"bring it with `pleat data add SOURCE --name {batch}`"
    say(f"Note: {folder} does not exist yet; {remedy}.")


def _override(document: CommentedMap, override: str, optional: list[tuple[str, ...]], recipe: str, root: Path) -> None:
    key, equals, given = override.partition("=")
    key = key.strip()
    if not equals:
        raise PleatError(f"Expected --set KEY=VALUE, but got '{override}'.")
    places = {".".join(map(str, keys)): (node, keys[-1]) for node, keys in _keys(document)}
    left_out = {".".join(keys): keys for keys in optional}
    if key not in places and key in left_out:
        places[key] = _made(document, left_out[key]), left_out[key][-1]
    if key not in places:
        known = [*places, *left_out]
        near = [name for name in known if name.endswith(f".{key}")] or difflib.get_close_matches(key, known)
        hint = f"the nearest are {' or '.join(near)}" if near else f"its blocks are {', '.join(document)}"
        raise PleatError(f"The recipe '{recipe}' has no key `{key}`; {hint}.")
    node, name = places[key]
    try:
        value = unshared(YAML(typ="safe").load(given))
    except YAMLError as error:
        raise PleatError(f"--set {key}: '{given}' is not valid YAML: {' '.join(str(error).split())}") from None
    if name == "weights" and value is not None:
        value = _weights(key, value if isinstance(value, str) else given, root)
    if isinstance(value, CommentedMap):
        value.fa.set_flow_style()  # on one line, as it was given
    if isinstance(node, CommentedMap) and name not in node:
        node.insert(max(len(node) - 1, 0), name, value)  # the blank line after the block belongs to its last key
    else:
        node[name] = value


def _made(document: CommentedMap, keys: tuple[str, ...]) -> CommentedMap:
    """The block that holds the last of `keys`, put in where it was left out."""
    node = document
    for key in keys[:-1]:
        if key not in node:
            node.insert(max(len(node) - 1, 0), key, CommentedMap())
            node[key].fa.set_flow_style()
        node = node[key]
    return node


def _optional(settings: Params) -> Iterator[tuple[str, ...]]:
    """Yields every key that may be left out of a model's settings."""
    for block, models in (("models", settings.models), ("training", settings.training)):
        for name, model in models.items():
            yield from ((block, name, *keys) for keys in _defaults(model))


def _defaults(block: BaseModel) -> Iterator[tuple[str, ...]]:
    for name, field in type(block).model_fields.items():
        if not field.is_required():
            yield (name,)
        value = getattr(block, name)
        if isinstance(value, BaseModel):
            yield from ((name, *keys) for keys in _defaults(value))


def _weights(key: str, given: str, root: Path) -> str:
    if (root / given).is_file():
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise PleatError(f"--set {key}: there is no file '{given}'; give the path of a .safetensors file, or null.")
    return str(path.absolute())


def _keys(node: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yields every key below `node` as its container and its path."""
    items: Any = ()
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, list):
        items = enumerate(node)
    for key, value in items:
        yield node, (*above, key)
        yield from _keys(value, (*above, key))


def _unshare(node: Any, seen: set[int]) -> None:
    """Turns aliases (`*name`) and merges (`<<`) into copies, so that a change stays where it was asked for."""
    for _, (*_, key) in [pair for pair in _keys(node) if len(pair[1]) == 1]:
        value = node[key]
        if not isinstance(value, CommentedMap | CommentedSeq):
            continue
        if id(value) in seen or getattr(value, "merge", None):
            value = node[key] = unshared(value)
        value.yaml_set_anchor(None)
        seen.add(id(value))
        _unshare(value, seen)
