"""Read the files that the template options name."""

from pathlib import Path
from typing import Any

from mcore_core.errors import usage_error


def read_system(value: str | None) -> str | None:
    """Return the system message: the text, or what the .txt file holds."""
    if value is None or not value.endswith(".txt"):
        return value
    try:
        return Path(value).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise usage_error(
            "MC413",
            f"--system {value}: {error.strerror or error}",
            "fix: give an existing .txt file, or the text itself",
        ) from error


def template_text(file: str) -> str:
    """Return what the file holds; whether it is a template is not looked at. Torch-free."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise usage_error(
            "MC413", f"--chat_template {file}: {error.strerror or error}", "fix: name a jinja file"
        ) from error


def read_chat_template(tokenizer: Any, file: str | None) -> str | None:  # noqa: ANN401
    """Return the file's template, or the tokenizer's own; None where it has none."""
    if file is None:
        try:
            return str(tokenizer.get_chat_template()) if tokenizer.chat_template else None
        except ValueError:  # several named templates and no default
            return None
    from jinja2 import TemplateSyntaxError  # noqa: PLC0415 - start-up stays light
    from transformers.utils.chat_template_utils import (  # noqa: PLC0415 - imports torch
        _compile_jinja_template,
    )

    text = template_text(file)
    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as error:
        raise usage_error(
            "MC413",
            f"--chat_template {file}:{error.lineno}: {error.message}",
            "fix: correct the line",
        ) from error
    return text
