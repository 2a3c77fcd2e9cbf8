"""Turn a conversation into token ids and the weight of each token: the chat template and its mask.

Which tokens train is never guessed. Two methods, the first that applies:

1. *Generation tags.* The template marks assistant turns with `{% generation %}`: those tokens.
2. *Prefix comparison.* For the assistant turn i, `before` is the rendering of the messages before
   it with the generation prompt (what the model is given at inference) and `after` that of the
   messages up to it. Both must be prefixes of the whole rendering; the text between them is what
   the model has to write. In turns before the last a template may leave out markup that it writes
   while a turn is the last one (Qwen3: an empty think block): then what remains of `after` must
   stand where the whole rendering departs from `before`. Where more than markup is left out
   (Qwen3: earlier thinking), or anything else differs, it is an error that shows where the
   renderings part.

Spans of text become tokens through the tokenizer's offsets. A token that reaches over the border
to the prompt does not train (the model never writes it); whitespace after the end-of-turn token
neither.
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
from mcore_core.errors import UsageError, usage_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcore_core.config.template import TemplateConfig

type Ids = "NDArray[np.int32]"
type Weights = "NDArray[np.float32]"
type Offsets = "NDArray[np.int64]"

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARKUP = re.compile(r"<[^<>\n]*>|\s+")
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
        ids, offsets = self._tokens(text, special=not has_bos, located=self._locates(spans))
        weights = self._weigh(text, ids, offsets, spans)
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
            spans = [self._turn(conversation, text, i) for i in sorted(trained)]
        ids, offsets = self._tokens(text, located=self._locates(spans))
        return ids, self._weigh(text, ids, offsets, spans)

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
            raise self._ambiguous(
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
        again, offsets = self._tokens(text)
        if offsets is None or again.tolist() != ids.tolist():
            raise self._ambiguous(
                "the template marks the assistant's turns, and the tokens of its text cannot be "
                "located",
                "so empty think blocks cannot be found (ignore_empty_think)",
            )
        starts = np.flatnonzero(np.diff(mask, prepend=0.0) > 0)
        spans = [(int(offsets[i, 0]), len(text)) for i in starts]
        for thought in self._scale.empty_thoughts(text, None if self._rounds == "all" else spans):
            mask[_inside(offsets, thought)] = 0.0
        return mask

    def _by_prefix(self, text: str, ids: Ids, span: Span) -> slice:
        """For a tokenizer without offsets: prefixes of the text must be prefixes of the tokens."""
        ends = []
        for end in span:
            prefix = self.tokenizer(text[:end], add_special_tokens=False)["input_ids"]
            lead = next((k for k in (0, 1) if ids[k : k + len(prefix)].tolist() == prefix), None)
            if lead is None:
                raise self._ambiguous(
                    f"the tokens of {text[:end][-60:]!r} are not a prefix of the whole's",
                    "and this tokenizer gives no offsets",
                )
            ends.append(lead + len(prefix))
        return slice(*ends)

    # -- which turns, where ------------------------------------------------------------------------

    def _trained(self, messages: Sequence[Message]) -> set[int]:
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        rounds = set(turns)
        if self._rounds == "last_round":
            users = [i for i, m in enumerate(messages) if m["role"] == "user"]
            rounds = {i for i in turns if i > max(users, default=-1)}
        return {i for i in turns if messages[i].get("loss", i in rounds)}

    def _turn(self, conversation: Conversation, text: str, i: int) -> Span:
        """Return where the assistant turn `i` stands in the whole rendering."""
        before = self._render(conversation, i, prompt=True)
        after = self._render(conversation, i + 1)
        if text.startswith(before) and text.startswith(after) and len(before) <= len(after):
            return len(before), len(after)
        start = _common(before, text)
        opened = before.rfind("<", 0, start)
        if ">" not in before[opened:start]:  # they part within a tag: <think> and <tool_call>
            start = max(opened, 0)
        last = all(m["role"] != "assistant" for m in conversation.messages[i + 1 :])
        if not last and start >= len(self._render(conversation, i)):
            at = start
            while text[:start] == after[:start] and at < len(after):
                if text.startswith(after[at:], start):
                    return start, start + len(after) - at
                markup = MARKUP.match(after, at)
                if markup is None:
                    break
                at = markup.end()
        shown = after if text.startswith(before) else before
        at = _common(shown, text)
        raise self._ambiguous(
            f"message {i} (assistant) is not rendered alone as within the whole conversation",
            f"alone:  ...{shown[max(0, at - 40) : at + 50]!r}",
            f"within: ...{text[max(0, at - 40) : at + 50]!r}",
        )

    def _ambiguous(self, *evidence: str) -> UsageError:
        return usage_error(
            "MC412",
            "the chat template cannot be masked: which tokens the assistant writes is ambiguous",
            *evidence,
            "fix: mark the assistant's turns with {% generation %} in a --chat_template FILE, or "
            "--loss_scale last_round to train only the last answer, or --loss_scale all",
        )

    # -- text and tokens ---------------------------------------------------------------------------

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

    def _tokens(
        self, text: str, *, special: bool = False, located: bool = True
    ) -> tuple[Ids, "Offsets | None"]:
        """Return the tokens and, where they are to be located, the characters each stands for."""
        fast = located and bool(getattr(self.tokenizer, "is_fast", False))
        out = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=fast)
        ids = np.asarray(out["input_ids"], np.int32)
        offsets = np.asarray(out["offset_mapping"], np.int64).reshape(-1, 2) if fast else None
        return ids, offsets

    def _locates(self, spans: Sequence[Span] | None) -> bool:
        """Return whether `_weigh` needs to know which characters a token stands for."""
        return spans is not None or self._scale.ignore_empty_think

    def _weigh(
        self, text: str, ids: Ids, offsets: "Offsets | None", spans: Sequence[Span] | None
    ) -> Weights:
        """Return 1 for the tokens in the spans, all with None, 0 for the others."""
        weights = np.full(len(ids), spans is None, np.float32)
        thoughts = self._scale.empty_thoughts(text, spans)
        if offsets is None:
            for span in spans or ():
                weights[self._by_prefix(text, ids, span)] = 1.0
            for thought in thoughts:
                weights[self._by_prefix(text, ids, thought)] = 0.0
            return weights
        special = np.isin(ids, list(self.tokenizer.all_special_ids))
        for start, end in spans or ():
            inside = _inside(offsets, (start, end))
            weights[inside] = 1.0
            ends = np.flatnonzero(inside & special)
            if len(ends) and not text[offsets[ends[-1], 1] : end].strip():
                weights[ends[-1] + 1 : np.flatnonzero(inside)[-1] + 1] = 0.0
        for thought in thoughts:
            weights[_inside(offsets, thought)] = 0.0
        return weights

    def _decode(self, ids: Ids) -> str:
        return str(self.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


def _inside(offsets: "Offsets", span: Span) -> "NDArray[np.bool_]":
    """Return which tokens stand for characters of the span alone."""
    start, end = span
    return (offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0])


def _common(a: str, b: str) -> int:
    """Return how many characters at their beginnings are equal."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
