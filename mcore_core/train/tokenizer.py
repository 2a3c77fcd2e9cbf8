"""The tokenizer of a run: the model's, with new special tokens where they are asked for."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_core.config.train import TrainConfig
from mcore_core.data.new_tokens import extend_tokenizer, read_new_tokens
from mcore_core.errors import usage_error
from mcore_core.train.plan import ModelSource

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig


def load_tokenizer(folder: Path) -> Any:  # noqa: ANN401
    """Return the model's tokenizer."""
    from transformers import AutoTokenizer  # noqa: PLC0415  (slow to import)

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8])
        raise usage_error(
            "MC515",
            f"{folder} has no tokenizer that can be read: {str(error).splitlines()[0]}",
            f"found: {found}",
            "fix: copy tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error


def with_new_tokens(
    source: ModelSource,
    config: "RunConfig",
    tokenizer: Any,  # noqa: ANN401
) -> ModelSource:
    """Add the new special tokens to the tokenizer, in place; return the source that has them.

    Raises:
        UsageError: A file of tokens cannot be used.
    """
    tokens = read_new_tokens(config[TrainConfig].new_special_tokens)
    if not tokens:
        return source
    return source.grown(extend_tokenizer(tokenizer, tokens, source.architecture.vocab_size))
