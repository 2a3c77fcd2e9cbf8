"""Which characters each token stands for, from the lengths of the tokens in bytes.

A tokenizer that works on bytes (GPT-2's way: SmolLM, Qwen and others) loses none: its tokens, one
after the other, are the text. So the sum of their lengths says where each stands, and a tokenizer
need not be asked for it, which takes a fifth of its time and as much again to read the answer.

This holds only where nothing that the tokenizer does can make the tokens longer than the text: that
is checked once. What makes them shorter (bytes that are left out, white space that an added token
takes with it) shows in each text's sum.
"""

import json
import unicodedata
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

type Form = Literal["NFC", "NFD", "NFKC", "NFKD"]

FORMS: tuple[Form, ...] = ("NFC", "NFD", "NFKC", "NFKD")
CUTTERS = ("Split", "Digits", "Punctuation")
"""Steps before the bytes that only say where a token must end, or leave characters out."""


class ByteLengths:
    """The bytes that each token of a byte-level tokenizer stands for."""

    def __init__(self, lengths: "NDArray[np.int64]", forms: tuple[Form, ...]) -> None:
        self._lengths = lengths  # [vocabulary]
        self._forms = forms

    @classmethod
    def of(cls, backend: Any) -> "ByteLengths | None":  # noqa: ANN401
        """Return those of a `tokenizers.Tokenizer`, or None for one that works otherwise."""
        forms = _forms(backend.normalizer)
        model = backend.model
        if forms is None or type(model).__name__ != "BPE" or not _is_exact(backend):
            return None
        if model.continuing_subword_prefix or model.end_of_word_suffix:
            return None
        from tokenizers.pre_tokenizers import ByteLevel  # noqa: PLC0415 - start-up stays light

        alphabet = set(ByteLevel.alphabet())  # a character for each byte
        vocabulary = backend.get_vocab(with_added_tokens=False)
        names_unknown = model.unk_token is not None or model.byte_fallback
        if names_unknown and not alphabet <= vocabulary.keys():  # by tokens longer than a byte
            return None
        added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        if any(not text.isascii() and set(text) <= alphabet for text in added.values()):
            return None  # the same token could stand for its own characters or for bytes
        lengths = np.zeros(max([*vocabulary.values(), *added]) + 1, np.int64)
        lengths[list(vocabulary.values())] = [len(token) for token in vocabulary]
        for i, text in added.items():
            lengths[i] = len(text.encode())
        return cls(lengths, forms)

    def offsets(self, text: str, ids: "NDArray[np.int32]") -> "NDArray[np.int64] | None":
        """Return the characters that each token stands for, or None where they are not known.

        Args:
            text: What was tokenized, nothing added before or after it.
            ids: [L], its tokens.

        Returns:
            [L, 2]: the first character and the one after the last. Tokens that share a character
            of several bytes stand for all of it, each.
        """
        ends = np.cumsum(self._lengths[ids])
        total = int(ends[-1]) if len(ends) else 0
        if text.isascii():
            if total != len(text):
                return None
            return np.stack([ends - self._lengths[ids], ends], axis=1)
        data = np.frombuffer(text.encode(), np.uint8)
        if total != len(data) or not all(unicodedata.is_normalized(f, text) for f in self._forms):
            return None
        nth = np.cumsum((data & 0xC0) != 0x80) - 1  # the character of each byte
        return np.stack([nth[ends - self._lengths[ids]], nth[ends - 1] + 1], axis=1)


def _forms(normalizer: Any) -> tuple[Form, ...] | None:  # noqa: ANN401
    """Return the Unicode forms that a normalizer brings texts into; None if it does more."""
    if normalizer is None:
        return ()
    steps = _steps(normalizer, "normalizers")
    forms = tuple(form for step in steps for form in FORMS if step["type"] == form)
    return forms if len(forms) == len(steps) else None


def _is_exact(backend: Any) -> bool:  # noqa: ANN401
    """Whether texts are cut, turned into bytes once as they are, and located as they were."""
    if backend.pre_tokenizer is None:
        return False
    steps = _steps(backend.pre_tokenizer, "pretokenizers")
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    if len(levels) != 1 or levels[0]["add_prefix_space"]:
        return False
    if any(step["type"] not in (*CUTTERS, "ByteLevel") for step in steps):
        return False
    post = [] if backend.post_processor is None else _steps(backend.post_processor, "processors")
    return all(
        step["type"] == "TemplateProcessing"
        or (step["type"] == "ByteLevel" and not step["trim_offsets"])
        for step in post
    )


def _steps(part: Any, inner: str) -> list[dict[str, Any]]:  # noqa: ANN401
    state: dict[str, Any] = json.loads(part.__getstate__())
    steps: list[dict[str, Any]] = state[inner] if state["type"] == "Sequence" else [state]
    return steps
