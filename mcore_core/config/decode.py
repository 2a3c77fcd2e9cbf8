"""Turn what was typed into what a field expects, and pydantic's complaints into plain words."""

import json
import math
import re
from typing import Any, assert_never

from pydantic_core import ErrorDetails

from mcore_core.config.option import Option
from mcore_core.errors import did_you_mean

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a JSON object",
}
_ITEMS = {int: "whole numbers", float: "numbers", str: "texts"}


def decode(option: Option, value: Any) -> Any:  # noqa: ANN401
    """Return the value for pydantic to check. Raises ValueError with what was expected."""
    if value is None or (isinstance(value, str) and _means_none(option, value)):
        return None
    match option.shape:
        case "flag":
            return value
        case "value":
            if isinstance(value, bool):  # pydantic would take true for 1
                raise ValueError(expected(option, value))
            return value
        case "list":
            return _decode_list(option, value)
        case "json":
            return _numbers(_parse(value, "{") if isinstance(value, str) else value)
        case _:
            assert_never(option.shape)


def _means_none(option: Option, value: str) -> bool:
    return option.optional and value.lower() in {"none", "null"} and "none" not in option.choices


def _decode_list(option: Option, value: Any) -> Any:  # noqa: ANN401
    items = value if isinstance(value, list) else [value]
    if len(items) == 1 and isinstance(items[0], str):
        text = items[0].strip()
        if text.startswith("["):
            items = _parse(text, "[")
        elif text.lower() in {"none", "null"} and "none" not in option.choices:
            return None if option.optional else []
    if any(isinstance(item, bool) for item in items) and option.item is not bool:
        raise ValueError(expected(option, value))
    return items


def _parse(text: str, opening: str) -> Any:  # noqa: ANN401
    example = '["a", "b"]' if opening == "[" else '{"key": "value"}'
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not valid JSON: {error.msg.lower()} at character {error.pos + 1} of {text!r}; "
            f"write it as '{example}', in single quotes for the shell"
        ) from error


def _numbers(value: Any) -> Any:  # noqa: ANN401
    """Read 1e-5 as a number, which YAML takes for text."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and _EXPONENT.fullmatch(value) and math.isfinite(float(value)):
        return float(value)
    return value


def shown(value: Any) -> str:  # noqa: ANN401
    """Return a value as a user would write it."""
    if isinstance(value, str):
        return repr(value)
    return "none" if value is None else json.dumps(value, default=str)


def as_typed(value: Any) -> str:  # noqa: ANN401
    """Return a value as it stands on a command line."""
    if isinstance(value, list):
        return " ".join(as_typed(item) for item in value) or "none"
    if isinstance(value, str):
        return value if value and not value.split()[1:] else repr(value)
    return shown(value)


def expected(option: Option, value: Any) -> str:  # noqa: ANN401
    """Return what the option takes and what it got."""
    if option.choices:
        kind = ("a list of " if option.shape == "list" else "one of ") + ", ".join(option.choices)
    elif option.shape == "list":
        kind = f"a list of {_ITEMS.get(option.item, 'values')}"
    else:
        kind = _KINDS[dict] if option.shape == "json" else _KINDS.get(option.item, "a value")
    return f"expected {kind}" + ("" if option.secret else f", got {shown(value)}")


def explain(option: Option, error: ErrorDetails) -> tuple[str, str]:
    """Return what is wrong with a value in a user's words, and a hint or an empty string."""
    value, kind, context = error["input"], error["type"], error.get("ctx", {})
    got = "" if option.secret else f", got {shown(value)}"
    bounds = {
        "greater_than": ("more than", "gt"),
        "greater_than_equal": ("at least", "ge"),
        "less_than": ("less than", "lt"),
        "less_than_equal": ("at most", "le"),
    }
    if kind in bounds:
        words, key = bounds[kind]
        return f"must be {words} {context[key]:g}{got}", ""
    if kind == "literal_error":
        choices = ", ".join(option.choices)
        hint = did_you_mean(value, option.choices) if isinstance(value, str) else ""
        return f"expected one of {choices}{got}", hint
    if kind == "value_error":
        return error["msg"].removeprefix("Value error, ") + got, ""
    if kind == "finite_number":
        return f"must be finite{got}", ""
    plain = {
        "bool": _KINDS[bool],
        "int": _KINDS[int],
        "float": _KINDS[float],
        "string": _KINDS[str],
        "dict": _KINDS[dict],
        "list": "a list",
    }.get(kind.partition("_")[0])
    if plain:
        return f"expected {plain}{got}", ""
    return error["msg"][0].lower() + error["msg"][1:] + got, ""
