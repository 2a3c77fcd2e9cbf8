"""Token ids of texts that are read, not continued."""

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from mcore_core.data.rows import Conversation, RowDropped, RowError
from mcore_core.data.template import TOO_LONG, Template

if TYPE_CHECKING:
    from numpy.typing import NDArray

type Ids = "NDArray[np.int32]"


class TextEncoder:
    """Tokenizes plain texts, with the tokenizer's own special tokens, and conversations."""

    def __init__(self, template: Template) -> None:
        self.max_length: int | None = template.max_length
        self.strategy = template.config.truncation_strategy
        self._template = copy.copy(template)

    def plain(self, text: str) -> Ids:
        """Tokenize a text as transformers' tokenizer does when it is called.

        Cut on the right it keeps the special tokens at its end, as the tokenizer's own truncation.

        Raises:
            RowDropped: Too long.
            RowError: There is nothing.
        """
        ids = self._ids(text, special=True)
        if self.strategy == "right" and self.max_length is not None and len(ids) > self.max_length:
            tokenizer: Any = self._template.tokenizer
            side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
            cut = tokenizer(text, truncation=True, max_length=self.max_length)
            tokenizer.truncation_side = side
            return np.asarray(cut["input_ids"], np.int32)
        return self.fitted(ids)

    def chat(self, conversation: Conversation) -> Ids:
        """Tokenize messages; where the last is not an assistant's, its turn is begun too.

        Raises:
            RowDropped: Too long.
            RowError: There is nothing, or the template refuses these messages.
            UsageError: The tokenizer has no template.
        """
        return self.fitted(self.whole(conversation))

    def whole(self, conversation: Conversation) -> Ids:
        """Do the same, whatever the length."""
        if not self._template.config.use_chat_template:
            text = "".join(message["content"] for message in conversation.messages)
            return self._ids(text, special=True)
        begins = conversation.messages[-1]["role"] != "assistant"
        return self._ids(self._template.render_prompt(conversation, begins=begins), special=False)

    def fitted(self, ids: Ids) -> Ids:
        """Cut to max_length, or drop, as truncation_strategy says."""
        if self.max_length is None or len(ids) <= self.max_length:
            return ids
        match self.strategy:
            case "left":
                return ids[-self.max_length :]
            case "right":
                return ids[: self.max_length]
            case _:
                raise RowDropped(TOO_LONG)

    def _ids(self, text: str, *, special: bool) -> Ids:
        found = self._template.tokenizer(text, add_special_tokens=special)["input_ids"]
        if not len(found):
            raise RowError("the text is empty")
        return np.asarray(found, np.int32)
