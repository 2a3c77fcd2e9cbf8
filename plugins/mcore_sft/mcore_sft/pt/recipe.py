"""Pre-training: a unit is a document, or a piece of a long one."""

from typing import ClassVar

from mcore_core.errors import usage_error
from mcore_core.protocols import Row, Unit
from mcore_sft.recipe import SFTRecipe


class PTRecipe(SFTRecipe):
    """As SFTRecipe; documents end with the tokenizer's EOS, and long ones are cut into pieces."""

    splits: ClassVar[bool] = True

    def encode(self, row: Row) -> list[Unit]:  # type: ignore[override]  # several units a row
        """Tokenize a document: units as SFTRecipe has them.

        Raises:
            UsageError: The tokenizer has no token that ends a document.
        """
        if self._template.tokenizer.eos_token_id is None:
            raise usage_error(
                "MC432",
                "the tokenizer has no EOS token to end documents with",
                "fix: name one as eos_token in the model's tokenizer_config.json",
            )
        return self._units(row)
