"""Heads in config.json: which one a checkpoint has, and what is written of one."""

from dataclasses import replace

import pytest

from mcore_core.errors import UsageError
from mcore_core.model.architecture import Architecture
from mcore_core.model.hf_head import as_language_model, labels, read_head, with_head, write_head
from mcore_core.protocols import HeadSpec

LM = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
CLASSIFIER = LM | {
    "architectures": ["Qwen3ForSequenceClassification"],
    "id2label": {"0": "no", "1": "yes", "2": "maybe"},
}
A = Architecture(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=61,
    max_position_embeddings=128,
    mtp_layers=1,
)


def test_names():
    assert as_language_model("Qwen3ForSequenceClassification") == "Qwen3ForCausalLM"
    assert as_language_model("Qwen3Model") == "Qwen3ForCausalLM"
    assert as_language_model("Qwen3ForCausalLM") == "Qwen3ForCausalLM"


def test_read():
    assert read_head(A, LM) == A
    assert read_head(A, CLASSIFIER) == replace(A, head="scores", scores=3, mtp_layers=0)
    assert read_head(A, {"architectures": ["Qwen3Model"]}).head == "none"
    assert labels({"num_labels": 5}) == 5
    assert labels({}) == 2  # as transformers has it


def test_with_head():
    spec = HeadSpec(output="scores", scores=3)
    assert with_head(A, spec, LM) == replace(A, head="scores", scores=3, mtp_layers=0)
    assert with_head(read_head(A, CLASSIFIER), spec, CLASSIFIER).scores == 3
    assert with_head(A, HeadSpec(output="hidden"), LM).head == "none"
    assert with_head(A, HeadSpec(output="logits", tokens=(1,)), LM) == A
    assert with_head(A, HeadSpec(), LM) == A


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (
            HeadSpec(output="scores", scores=2),
            "a Qwen3ForSequenceClassification with 3 labels, the run needs 2",
        ),
        (HeadSpec(), "has no output layer to predict tokens with"),
    ],
)
def test_a_head_that_does_not_fit(spec, says):
    with pytest.raises(UsageError, match=says) as error:
        with_head(read_head(A, CLASSIFIER), spec, CLASSIFIER)
    assert error.value.problems[0].code == "MC546"


def test_write():
    assert write_head(A, LM) == {}
    scores = replace(A, head="scores", scores=2)
    assert write_head(scores, LM) == {
        "architectures": ["Qwen3ForSequenceClassification"],
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    }
    kept = write_head(replace(scores, scores=3), CLASSIFIER)
    assert kept == {"architectures": ["Qwen3ForSequenceClassification"]}
    assert write_head(replace(A, head="none"), LM) == {"architectures": ["Qwen3Model"]}
    gemma = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    named = write_head(scores, gemma)["architectures"]
    assert named == ["Gemma3TextForSequenceClassification"]
