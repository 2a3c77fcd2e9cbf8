"""What a checkpoint's Hugging Face files have beside the weights: config entries, further files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_core.model.hf_head import write_head

if TYPE_CHECKING:
    from mcore_core.model.architecture import Architecture
    from mcore_core.protocols import Recipe
    from mcore_core.train.plan import ModelSource


def export_config(
    source: "ModelSource",
    tokenizer: Any,  # noqa: ANN401
    recipe: "Recipe[Any]",
) -> dict[str, Any]:
    """Return the entries of config.json that training changed.

    A recipe may add to them with `export_config`. A classifier gets a padding token, without which
    transformers scores no batch.
    """
    entries = write_head(source.architecture, source.hf_config)
    if source.growth is not None:
        entries["vocab_size"] = source.architecture.vocab_size
    if source.architecture.head == "scores":
        entries["pad_token_id"] = padding(source.hf_config.get("pad_token_id"), tokenizer)
    return entries | dict(getattr(recipe, "export_config", {}))


STALE = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt")
"""Files of a tokenizer that say less than tokenizer.json once it has more tokens."""


def write_tokenizer(folder: Path, tokenizer: Any) -> None:  # noqa: ANN401
    """Write a tokenizer with new tokens over what a folder has of its model's."""
    for name in STALE:
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)


def padding(configured: int | None, tokenizer: Any) -> int | None:  # noqa: ANN401
    """Return the padding token of an exported classifier: config.json's, else the tokenizer's."""
    for found in (configured, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    return None


def write_files(folder: Path, recipe: "Recipe[Any]", architecture: "Architecture") -> None:
    """Write what a recipe adds with `export_files(architecture)`: path in the folder -> text."""
    find = getattr(recipe, "export_files", None)
    files: dict[str, str] = {} if find is None else find(architecture)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
