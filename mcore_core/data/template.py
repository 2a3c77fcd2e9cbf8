"""Turn a conversation into token ids and the weight of each token: the chat template and its mask.

Which tokens train is never guessed. Two methods, the first that applies:

1. *Generation tags.* The template marks assistant turns with `{% generation %}`: those tokens.
2. *Prefix comparison.* What the rendering with a turn adds to the one before it: see data/turns.py.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mcore_core.data.fit import NOTHING_TRAINS as NOTHING_TRAINS
from mcore_core.data.fit import TOO_LONG as TOO_LONG
from mcore_core.data.fit import Encoded as Encoded
from mcore_core.data.fit import fitted
from mcore_core.data.loss_scale import LossScale, Span
from mcore_core.data.rows import Conversation, Message, RowError
from mcore_core.data.template_files import read_chat_template, read_system
from mcore_core.data.tokens import Ids
from mcore_core.data.turns import ambiguous, turn_span
from mcore_core.data.weigh import Weigher, Weights, inside
from mcore_core.errors import usage_error

if TYPE_CHECKING:
    from mcore_core.config.template import TemplateConfig

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
NO_TEMPLATE_FIX = (
    "fix: --chat_template FILE.jinja, or --use_chat_template false to join the messages as plain "
    "text, or give rows with a 'text' column"
)


class Template:
    """A tokenizer and the options of its chat template. Picklable."""

    def __init__(
        self,
        tokenizer: Any,  # noqa: ANN401
        config: "TemplateConfig",
        *,
        max_length: int | None = None,
        splits: bool = False,
    ) -> None:
        """Read the files that the options name.

        Args:
            tokenizer: A Hugging Face tokenizer.
            config: The template options.
            max_length: Used where the option is none: the model's own limit.
            splits: Whether the recipe makes several samples of a long row: see `encode_pieces`.

        Raises:
            UsageError: An option cannot be used.
        """
        self.tokenizer = tokenizer
        self.config = config
        self.max_length = config.max_length or max_length
        self.system = read_system(config.system)
        self.chat_template = read_chat_template(tokenizer, config.chat_template)
        self._scale = LossScale.parse(config.loss_scale)
        self._rounds = self._scale.rounds
        self._weigher = Weigher(tokenizer, self._scale)
        if config.truncation_strategy != "split":
            return
        if not splits:
            raise usage_error(
                "MC414",
                "--truncation_strategy split cannot be used with conversations: the later parts of "
                "one have no prompt",
                "fix: --truncation_strategy delete, left or right, or --plugin pt, which trains on "
                "all of a text",
            )
        if self.max_length == 1:
            raise usage_error(
                "MC414",
                "--truncation_strategy split with --max_length 1: a token by itself has nothing to "
                "be predicted from",
                "fix: --max_length 2 or more",
            )

    @property
    def _weigh(self) -> Weigher:
        if self._weigher.tokenizer is not self.tokenizer:
            self._weigher = Weigher(self.tokenizer, self._scale)
        return self._weigher

    def fingerprint(self) -> str:
        """Return a hash of everything that changes what `encode` returns."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab())
        parts = [
            type(self.tokenizer).__name__,
            vocabulary,
            str(self.tokenizer.special_tokens_map),
            self.chat_template,
            self.system,
            self.max_length,
            self.config.truncation_strategy,
            self.config.use_chat_template,
            self.config.loss_scale,
            self.config.enable_thinking,
        ]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()

    def encode(self, conversation: Conversation) -> Encoded:
        """Tokenize one sample and weigh its tokens.

        Returns:
            ids and weights, both [L], L at most max_length; weights[0] is 0.

        Raises:
            RowDropped: Too long, or nothing to train on.
            RowError: The template refuses these messages.
            UsageError: The template cannot be masked, or the tokenizer has none.
        """
        (encoded,) = self.encode_pieces(conversation)
        return encoded

    def encode_pieces(self, conversation: Conversation) -> list[Encoded]:
        """Return the same as a list: several pieces of a long sample with the strategy `split`."""
        if conversation.text is not None:
            ids, weights = self._plain(conversation.text, None)
        elif not self.config.use_chat_template:
            ids, weights = self._joined(conversation.messages)
        else:
            ids, weights = self._chat(conversation)
        return fitted(ids, weights, self.max_length, self.config.truncation_strategy)

    def render_prompt(self, conversation: Conversation, *, begins: bool = True) -> str:
        """Return the text of all messages and, if it `begins`, the start of the assistant's turn.

        Raises:
            RowError: The template refuses these messages.
            UsageError: The tokenizer has no template.
        """
        self._require_template()
        return self._render(conversation, len(conversation.messages), prompt=begins)

    def describe(self, unit: Mapping[str, Any]) -> str:
        """Return the unit's text; what trains stands between «»."""
        ids, trains = unit["input_ids"], np.asarray(unit["weights"]) > 0
        borders = [0, *(np.flatnonzero(np.diff(trains)) + 1).tolist(), len(ids)]  # len(ids) >= 1
        runs = [(self._decode(ids[a:b]), trains[a]) for a, b in pairwise(borders)]
        return "".join(f"«{text}»" if on else text for text, on in runs)

    # -- the three ways to tokens ------------------------------------------------------------------

    def _plain(self, text: str, spans: Sequence[Span] | None) -> tuple[Ids, Weights]:
        """Text as it is, the tokenizer's own BOS before it and EOS after it, each once."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token_id
        has_bos = bool(bos) and text.startswith(bos)
        ids, weights = self._weigh(text, spans, special=not has_bos)
        if eos is not None and (not len(ids) or ids[-1] != eos):
            ids = np.append(ids, np.int32(eos))
            ends_trained = spans is None or bool(spans and spans[-1][1] == len(text))
            weights = np.append(weights, np.float32(ends_trained))
        return ids, weights

    def _joined(self, messages: Sequence[Message]) -> tuple[Ids, Weights]:
        trained = self._trained(messages)
        text, spans = "", []
        for i, message in enumerate(messages):
            end = len(text) + len(message["content"])
            if i in trained:
                spans.append((len(text), end))
            text += message["content"]
        return self._plain(text, None if self._rounds == "all" else spans)

    def _chat(self, conversation: Conversation) -> tuple[Ids, Weights]:
        chat_template = self._require_template()
        trained = self._trained(conversation.messages)
        if GENERATION.search(chat_template):
            return self._tagged(conversation, trained)
        text = self._render(conversation, len(conversation.messages))
        spans = None
        if self._rounds != "all":
            spans = [turn_span(self._render, conversation, text, i) for i in sorted(trained)]
        return self._weigh(text, spans)

    def _require_template(self) -> str:
        if self.chat_template is None:
            raise usage_error(
                "MC411",
                "the tokenizer has no chat template, and the dataset's rows are conversations",
                f"tokenizer: {self.tokenizer.name_or_path or type(self.tokenizer).__name__}",
                NO_TEMPLATE_FIX,
            )
        return self.chat_template

    def _tagged(self, conversation: Conversation, trained: set[int]) -> tuple[Ids, Weights]:
        out = self._apply(
            conversation,
            len(conversation.messages),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids = np.asarray(out["input_ids"], np.int32)
        mask = np.asarray(out["assistant_masks"], np.float32)
        if self._rounds == "all":
            mask[:] = 1.0
        return ids, self._without_thoughts(
            conversation, ids, self._chosen(conversation, mask, trained)
        )

    def _chosen(self, conversation: Conversation, mask: Weights, trained: set[int]) -> Weights:
        """Return the mask of all assistant turns without those that do not train."""
        turns = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        if self._rounds == "all" or trained == set(turns):
            return mask
        edges = np.flatnonzero(np.diff(mask, prepend=0.0, append=0.0))
        runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        if len(runs) != len(turns):
            raise ambiguous(
                f"it has {len(turns)} assistant turns, but the template's generation tags mark "
                f"{len(runs)} stretches of tokens",
                "so the turns that train cannot be told from those that do not",
            )
        for turn, (start, end) in zip(turns, runs, strict=True):
            mask[start:end] *= turn in trained
        return mask

    def _without_thoughts(self, conversation: Conversation, ids: Ids, mask: Weights) -> Weights:
        """Return the mask of tagged turns without the empty think blocks that do not train."""
        if not self._scale.ignore_empty_think:
            return mask
        text = self._render(conversation, len(conversation.messages))
        again, offsets = self._weigh.tokens(text)
        if offsets is None or again.tolist() != ids.tolist():
            raise ambiguous(
                "the template marks the assistant's turns, and the tokens of its text cannot be "
                "located",
                "so empty think blocks cannot be found (ignore_empty_think)",
            )
        starts = np.flatnonzero(np.diff(mask, prepend=0.0) > 0)
        spans = [(int(offsets[i, 0]), len(text)) for i in starts]
        for thought in self._scale.empty_thoughts(text, None if self._rounds == "all" else spans):
            mask[inside(offsets, thought)] = 0.0
        return mask

    # -- which turns, where ------------------------------------------------------------------------

    def _trained(self, messages: Sequence[Message]) -> set[int]:
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        rounds = set(turns)
        if self._rounds == "last_round":
            users = [i for i, m in enumerate(messages) if m["role"] == "user"]
            rounds = {i for i in turns if i > max(users, default=-1)}
        return {i for i in turns if messages[i].get("loss", i in rounds)}

    # -- text --------------------------------------------------------------------------------------

    def _render(self, conversation: Conversation, stop: int, *, prompt: bool = False) -> str:
        text = self._apply(conversation, stop, tokenize=False, add_generation_prompt=prompt)
        assert isinstance(text, str)
        return text

    def _apply(self, conversation: Conversation, stop: int, **options: Any) -> Any:  # noqa: ANN401
        from jinja2.exceptions import TemplateError  # noqa: PLC0415 - start-up stays light

        messages = [
            {k: v for k, v in m.items() if k != "loss"} for m in conversation.messages[:stop]
        ]
        if self.config.enable_thinking is not None:
            options["enable_thinking"] = self.config.enable_thinking
        if conversation.tools:
            options["tools"] = list(conversation.tools)
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, **options
            )
        except (TemplateError, IndexError, TypeError, KeyError) as error:
            raise RowError(f"the chat template refuses these messages: {error}") from error

    def _decode(self, ids: Ids) -> str:
        return str(self.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))
