"""What a reranker is asked about a query and a document: the prompt of Qwen3-Reranker."""

import copy
from typing import Any

import numpy as np

from mcore_core.config.template import TemplateConfig
from mcore_core.data.rows import Conversation, RowDropped
from mcore_core.data.template import TOO_LONG, Template
from mcore_core.errors import usage_error
from mcore_sft.tasks.config import RerankerConfig
from mcore_sft.tasks.documents import Text
from mcore_sft.tasks.texts import Ids, TextEncoder

JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "{yes}" or "{no}".'
)
ASK = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"


class RerankerPrompt:
    """Renders prompts through the chat template; where they are too long, the document is cut.

    A template that can think is told not to, unless `enable_thinking` is given: the answer has to
    be the next token.
    """

    def __init__(self, options: RerankerConfig, template: Template) -> None:
        self.options = options
        self._template = _without_thoughts(template)
        self._texts = TextEncoder(self._template)

    def answers(self) -> tuple[int, int]:
        """Return the ids of yes and no. Raises UsageError where either is not one token."""
        names = ("reranker_positive_token", "reranker_negative_token")
        return self._answer(names[0]), self._answer(names[1])

    def _answer(self, option: str) -> int:
        word = getattr(self.options, option)
        tokenizer = self._template.tokenizer
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return int(ids[0])
        raise usage_error(
            "MC386",
            f"--{option} {word!r} is not one token of this tokenizer",
            f"it is {tokenizer.convert_ids_to_tokens(ids)}",
            "fix: name a word that is one token",
        )

    def __call__(self, query: Text, document: Text) -> Ids:
        """Return the token ids of one question.

        Raises:
            RowDropped: Too long: with truncation_strategy delete, or also without the document.
        """
        instruction = document.system or query.system or self.options.reranker_instruction
        ids = self._rendered(instruction, query.text, document.text)
        limit, text = self._texts.max_length, document.text
        if limit is None or len(ids) <= limit:
            return ids
        if self._texts.strategy == "delete":
            raise RowDropped(TOO_LONG)
        while len(ids) > limit and text:
            text = self._shorter(text, len(ids) - limit)
            ids = self._rendered(instruction, query.text, text)
        if not text:
            raise RowDropped(TOO_LONG)
        return ids

    def _rendered(self, instruction: str, query: str, document: str) -> Ids:
        judge = JUDGE.format(
            yes=self.options.reranker_positive_token, no=self.options.reranker_negative_token
        )
        ask = ASK.format(instruction=instruction, query=query, document=document)
        if not self._template.config.use_chat_template:
            judge, ask = judge + "\n", ask + "\n"
        messages = ({"role": "system", "content": judge}, {"role": "user", "content": ask})
        return self._texts.whole(Conversation(messages=messages))

    def _shorter(self, text: str, tokens: int) -> str:
        """Return a text without its last tokens: at truncation_strategy left, its first ones."""
        ids = np.asarray(self._template.tokenizer(text, add_special_tokens=False)["input_ids"])
        if tokens >= len(ids):
            return ""
        kept = ids[tokens:] if self._texts.strategy == "left" else ids[:-tokens]
        return str(self._template.tokenizer.decode(kept.tolist()))


def _without_thoughts(template: Template) -> Template:
    config: Any = template.config
    if config.enable_thinking is not None:
        return template
    told = copy.copy(template)
    told.config = TemplateConfig(**{**dict(config), "enable_thinking": False})
    return told
