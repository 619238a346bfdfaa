"""What is wrong with a params.yaml, in words of its reader instead of pydantic's."""

from typing import Any

LONGEST_VALUE_SHOWN = 80
KINDS = {
    "compress": "'int8', 'shared_weights', 'smaller_input', 'fewer_filters', 'pruned' or 'distilled'",
    "models": "'frozen' or 'custom_cnn'",
    "targets": "'multiclass' or 'multilabel'",
    "training": "'cross_entropy', 'focal' or 'asymmetric'",  # of a loss
}
NULLABLE = {("split", "group_by"), ("labels", "top_classes")}


def sentence(error: Any, where: str) -> str:
    """One of pydantic's errors in words that a reader of the file `where` understands."""
    location, kind, given = list(error["loc"]), error["type"], error.get("input")
    if location[-1:] == ["[key]"]:  # pydantic's way to say that the entry's name itself is wrong
        block = ".".join(map(str, location[:-2]))
        return f"{where}: every name in `{block}` must be {_expected(error)}, but one is {shown(given)}."
    # Where a block's `kind` chooses its keys, pydantic adds the kind to the path; it is no key of the file.
    if location[:1] in (["models"], ["targets"]):
        del location[2:3]
    elif location[:2] == ["compress", "techniques"] or (location[:1] == ["training"] and location[2:3] == ["loss"]):
        del location[3:4]
    key = ".".join(map(str, location))
    if kind in ("extra_forbidden", "invalid_key"):
        return f"{where}: unknown key `{key}`; remove it or correct its name."
    if kind == "missing":
        return f"{where}: `{key}` is missing."
    if kind == "value_error":
        return f"{where}: {f'`{key}` ' if key else ''}{error['ctx']['error']}."
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        found = f"but got {shown(given['kind'])}" if "kind" in given else "but is missing"
        return f"{where}: `{key}.kind` must be {KINDS[location[0]]}, {found}."
    return f"{where}: {f'`{key}`' if key else 'it'} must be {_expected(error)}, but got {shown(given)}."


def _expected(error: Any) -> str:
    """What a value must be, in words of the file's reader instead of pydantic's."""
    kind, limit = error["type"], error.get("ctx", {})
    or_null = " or null" if error["loc"] in NULLABLE else ""
    words = {
        "literal_error": limit.get("expected"),
        "string_type": "text (put it in quotes)",
        "int_type": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "list_type": "a list",
        "dict_type": "a block of keys",
        "model_type": "a block of keys",
        "model_attributes_type": "a block of keys",
        "string_pattern_mismatch": "letters, digits, '_' and '.', beginning with a letter or digit",
        "string_too_long": f"at most {limit.get('max_length')} characters long",
        "too_short": f"a list of at least {limit.get('min_length')}",
        "greater_than_equal": f"at least {limit.get('ge', 0):.10g}",
        "greater_than": f"more than {limit.get('gt', 0):.10g}",
        "less_than_equal": f"at most {limit.get('le', 0):.10g}",
        "less_than": f"less than {limit.get('lt', 0):.10g}",
    }
    return (words.get(kind) or error["msg"].removeprefix("Input should be ")) + or_null


def shown(value: Any) -> str:
    """A value as it stands in YAML, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE_SHOWN else f"{text[:LONGEST_VALUE_SHOWN]}..."
