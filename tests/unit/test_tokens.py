"""Tokens and where they stand, against the tokenizer's own call, for many kinds of tokenizers."""

import pickle
import random

import numpy as np
import pytest
from data_tools import make_tokenizer
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from mcore_core.data.offsets import ByteLengths
from mcore_core.data.tokens import Tokens

SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "<unk>"]
WORDS = [
    *("the", "answer", " is", "  42", "\n", "\n\n", "\t", " ", "a", "don't", "x=1;", "<|im_end|>"),
    *("<|im_start|>", "<tool>", "été", "e\u0301", "\u1100\u1161", "ﬁ", "日本語", "🙂", "\u00a0"),
    *("👩\u200d👧", "\ufeff", "ß", "Ġ", "é", "١٢", "\x00", "\r\n", "<s>"),
]


def texts(count=300, seed=0):
    draw = random.Random(seed)
    return ["", *("".join(draw.choices(WORDS, k=draw.randrange(1, 30))) for _ in range(count))]


def byte_level(**changes):
    """A byte-level BPE with merges, as Qwen's and SmolLM's, and what `changes` names."""
    level = pre_tokenizers.ByteLevel(
        add_prefix_space=changes.get("prefix", False), use_regex=changes.get("regex", True)
    )
    tokenizer = Tokenizer(models.BPE(**changes.get("model", {})))
    tokenizer.normalizer = changes.get("normalizer")
    before = changes.get("before", [])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, level]) if before else level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = changes.get("post")
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=changes.get("alphabet", pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts(200, seed=1) if "alphabet" not in changes else [], trainer)
    tokenizer.add_tokens(changes.get("added", []))
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=100, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts(200, seed=1), trainer)
    return tokenizer


def byte_fallback():
    """As Llama 2's: characters, and bytes of those that are unknown as tokens of six letters."""
    letters = [*SPECIAL, "▁", *"abcdefhiknrstw", *(f"<0x{i:02X}>" for i in range(256))]
    vocabulary = {token: i for i, token in enumerate(letters)}
    model = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


LLAMA3 = pre_tokenizers.Split(r" ?\w+|\s+|[^\w\s]+", "isolated")
WITH_BOS = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
STRIPPING = [AddedToken("<tool>", lstrip=True, rstrip=True)]
EVERY_BYTE = pre_tokenizers.ByteLevel.alphabet()
# name -> (the tokenizer, whether lengths alone locate tokens where nothing is lost)
KINDS = {
    "plain": (byte_level, True),
    "digits apart": (lambda: byte_level(before=[pre_tokenizers.Digits(True)]), True),
    "split": (lambda: byte_level(before=[LLAMA3], regex=False), True),
    "NFC": (lambda: byte_level(normalizer=normalizers.NFC()), True),
    "NFKC": (lambda: byte_level(normalizer=normalizers.Sequence([normalizers.NFKC()])), True),
    "bos": (lambda: byte_level(post=WITH_BOS), True),
    "untrimmed": (lambda: byte_level(post=processors.ByteLevel(trim_offsets=False)), True),
    "added tokens that strip": (lambda: byte_level(added=STRIPPING), True),
    "spaces left out": (lambda: byte_level(before=[pre_tokenizers.Split(" ", "removed")]), True),
    "unknown bytes left out": (lambda: byte_level(alphabet=EVERY_BYTE[::2]), True),
    "ignores merges": (lambda: byte_level(model={"ignore_merges": True}), True),
    "unknown bytes named": (
        lambda: byte_level(alphabet=EVERY_BYTE[::2], model={"unk_token": "<unk>"}),
        False,
    ),
    "trimmed": (lambda: byte_level(post=processors.ByteLevel(trim_offsets=True)), False),
    "space before": (lambda: byte_level(prefix=True, added=STRIPPING), False),
    "lower case": (lambda: byte_level(normalizer=normalizers.Lowercase()), False),
    "an added byte": (lambda: byte_level(added=["é"]), False),
    "unigram": (unigram, False),
    "byte fallback": (byte_fallback, False),
}


def fast(tokenizer, **options):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        **options,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_places_are_those_of_the_tokenizers_own_call(kind, monkeypatch):
    make, measures = KINDS[kind]
    tokenizer = fast(make())
    tokens = Tokens(tokenizer)
    known = []
    if measures:
        ask = ByteLengths.offsets

        def counted(self, text, ids):
            found = ask(self, text, ids)
            known.append(found is not None)
            return found

        monkeypatch.setattr(ByteLengths, "offsets", counted)
    for special in (False, True):
        for text in texts():
            own = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
            ids, offsets = tokens(text, special=special)
            assert ids.tolist() == own["input_ids"]
            assert offsets.tolist() == [list(pair) for pair in own["offset_mapping"]], text
            assert (ids.dtype, offsets.dtype, offsets.shape[1]) == (np.int32, np.int64, 2)
            alone, none = tokens(text, special=special, located=False)
            assert alone.tolist() == own["input_ids"] and none is None
    assert (ByteLengths.of(tokenizer.backend_tokenizer) is not None) == measures
    assert any(known) == measures  # else this compares the tokenizer with itself


def test_a_class_with_a_call_of_its_own_is_asked_through_it():
    class Shouts(PreTrainedTokenizerFast):
        def _encode_plus(self, text, **options):
            return super()._encode_plus(text.upper(), **options)

    tokenizer = Shouts(tokenizer_object=byte_level())
    ids, offsets = Tokens(tokenizer)("abc")
    assert tokenizer.decode(ids) == "ABC"
    assert offsets.tolist()[-1][1] == 3


def test_settings_left_in_the_rust_tokenizer_do_not_cut_texts():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokens = Tokens(tokenizer)
    for located in (False, True):
        tokenizer.backend_tokenizer.enable_truncation(3)
        assert len(tokens("abcdefg", located=located)[0]) == 7


def test_special_tokens_are_split_where_the_tokenizer_is_told_so():
    tokenizer = fast(byte_level(), split_special_tokens=True)
    tokens = Tokens(tokenizer)
    text = "a<|im_end|>"
    first, again = tokens(text)[0].tolist(), tokens(text)[0].tolist()
    assert first == again == tokenizer(text)["input_ids"]
    assert not tokens.special(np.array(first, np.int32)).any()


def test_special_tokens_are_told_by_their_ids():
    tokenizer = make_tokenizer()
    tokens = pickle.loads(pickle.dumps(Tokens(tokenizer)))
    ids = np.array([0, 1, 2, 3, 4, 10**6], np.int32)
    expected = [int(i) in tokenizer.all_special_ids for i in ids]
    assert tokens.special(ids).tolist() == expected
    assert any(expected) and not all(expected)
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    assert not Tokens(bare).special(ids).any()
