"""What each family reads from an HF config, and what it refuses."""

import json
import math
from importlib import import_module

import pytest
from mcore_hfbridge.families import llama, qwen2, qwen3

from mcore_core.component import Catalogue
from mcore_core.errors import UsageError
from mcore_core.manager import PluginManager
from mcore_core.model.resolve import read_hf_config, resolve_family, resolve_model_dir

BASE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def texts(read, **changes) -> str:
    with pytest.raises(UsageError) as error:
        read({**BASE, **changes})
    return str(error.value)


def test_llama_reads_every_number():
    a = llama.architecture({**BASE, "head_dim": 20, "tie_word_embeddings": True, "rope_theta": 5e5})
    assert (a.num_layers, a.hidden_size, a.ffn_hidden_size, a.vocab_size) == (3, 48, 80, 101)
    assert (a.num_attention_heads, a.num_query_groups, a.kv_channels) == (4, 2, 20)
    assert (a.norm_epsilon, a.rotary_base, a.rope_scaling) == (1e-5, 5e5, None)
    assert a.tie_word_embeddings
    assert not a.add_qkv_bias
    assert llama.architecture({**BASE, "num_key_value_heads": None}).num_query_groups == 4


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 5e5}},
    ],
)
def test_both_spellings_of_rope(spelling):
    a = llama.architecture({**BASE, **spelling})
    assert a.rotary_base == 5e5
    expected = {"rope_type": "llama3", "original_max_position_embeddings": 64, **LLAMA3}
    assert a.rope_scaling == expected


def test_plain_rope_of_transformers_5():
    rope = {"rope_type": "default", "rope_theta": 1234.0}
    a = qwen3.architecture({**BASE, "rope_parameters": rope})
    assert (a.rotary_base, a.rope_scaling) == (1234.0, None)


def test_biases():
    a = llama.architecture({**BASE, "attention_bias": True, "mlp_bias": True})
    assert (a.add_qkv_bias, a.attention_output_bias, a.mlp_bias) == (True, True, True)
    a = llama.architecture({**BASE, "attention_bias": True})
    assert (a.add_qkv_bias, a.attention_output_bias, a.mlp_bias) == (True, True, False)
    a = qwen2.architecture(BASE)
    assert (a.add_qkv_bias, a.attention_output_bias, a.kv_channels) == (True, False, 12)
    a = qwen3.architecture(BASE)
    assert (a.add_qkv_bias, a.qk_layernorm, a.kv_channels) == (False, True, 128)
    a = qwen3.architecture({**BASE, "attention_bias": True})
    assert (a.add_qkv_bias, a.attention_output_bias, a.mlp_bias) == (True, True, False)


@pytest.mark.parametrize(
    ("given", "window", "layers"),
    [
        ({"sliding_window": 8}, None, ()),
        ({"sliding_window": 8, "use_sliding_window": True}, None, ()),  # max_window_layers is 28
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, 8, (1, 2)),
        (
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            8,
            (0, 2),
        ),
    ],
)
def test_windows(given, window, layers):
    a = qwen2.architecture({**BASE, **given})
    assert (a.window_size, a.window_layers) == (window, layers)


def test_windows_equal_transformers():
    from transformers import Qwen2Config

    given = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}
    hf = Qwen2Config(**BASE, **given)
    a = qwen2.architecture({**BASE, **given})
    windowed = [i for i, k in enumerate(hf.layer_types) if k == "sliding_attention"]
    assert (a.window_size, list(a.window_layers)) == (hf.sliding_window, windowed) == (8, [2])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_act": "mish"}, "hidden_act = 'mish': qwen2 supports silu, swish, gelu"),
        (
            {"quantization_config": {"bits": 4}},
            "of quantized weights only fp8 with weight_block_size and mxfp4",
        ),
        ({"vocab_size": 0}, "vocab_size = 0: qwen2 needs a positive integer"),
        ({"num_hidden_layers": None}, "num_hidden_layers = None: qwen2 needs a positive integer"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "unknown rope_type 'spiral'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type linear needs factor"),
        ({"rope_parameters": {"full_attention": {}}}, "one rope for all layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: qwen2 rotates the whole"),
        ({"layer_types": ["full_attention"]}, "it lists 1 layers, num_hidden_layers is 3"),
        ({"layer_types": ["chunked_attention"] * 3}, "not chunked_attention"),
        ({"layer_types": ["sliding_attention"] * 3}, "it names sliding_attention"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small': it must be a number"),
    ],
)
def test_refuses_with_the_key(changes, text):
    message = texts(qwen2.architecture, **changes)
    assert message.startswith("error[MC512]: the model's config.json has ")
    assert text in message
    assert "fix: " in message


MOE = {
    "num_experts_per_tok": 4, "moe_intermediate_size": 8, "n_routed_experts": 8,
    "n_shared_experts": 1, "norm_topk_prob": True,
}  # fmt: skip
DEEPSEEK = {**BASE, **MOE, "num_key_value_heads": 4, "n_group": 1, "rms_norm_eps": 1e-6}
REFUSED = {
    "mistral": ({}, {"layer_types": ["full_attention"] * 3}),
    "mixtral": ({}, {"router_jitter_noise": 0.1}),
    "olmoe": ({}, {"clip_qkv": 8.0}),
    "phi3": ({}, {"resid_pdrop": 0.1}, {"embd_pdrop": 0.1}),
    "gemma": ({}, {"use_bidirectional_attention": True}),
    "gemma3_text": (
        {},
        {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0},
        {"use_bidirectional_attention": True},
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
    ),
    "gpt_oss": ({}, {"swiglu_alpha": 1.5}, {"quantization_config": {"quant_method": "gptq"}}),
    "stablelm": (
        {},
        {"qk_layernorm": True},
        {"use_parallel_residual": True},
        {"hidden_dropout": 0.1},
    ),
    "starcoder2": ({}, {"embedding_dropout": 0.1}),
    "smollm3": ({}, {"no_rope_layers": [1]}),
    "qwen3_next": (MOE, {"attention_bias": True}, {"layer_types": ["sliding_attention"] * 3}),
    "ernie4_5_moe": ({}, {"use_bias": True}, {"num_nextn_predict_layers": 2}),
    "minimax_m2": ({}, {"scoring_func": "softmax"}, {"use_qk_norm": False}),
    "deepseek_v2": (
        DEEPSEEK | {"norm_topk_prob": False},
        {"topk_method": "noaux_tc"},
        {"norm_topk_prob": True},
        {"scoring_func": "sigmoid"},
        {"mlp_bias": True},
        {"attention_bias": True},
        {"num_key_value_heads": 2},
        {"rms_norm_eps": 1e-5},
    ),
    "deepseek_v3": (
        DEEPSEEK,
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 1},
        {"n_group": 4, "topk_group": 1},
        {"scoring_func": "softmax"},
    ),
    "exaone_moe": (MOE, {"sliding_window_pattern": "LLLG"}, {"mlp_layer_types": ["dense"]}),
}
"""Family -> what its config needs beside BASE, and changes of which each is refused."""


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name, (_, *changes) in REFUSED.items() for change in changes],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_what_a_family_cannot_honour_is_refused_by_name(name, change):
    read = import_module(f"mcore_hfbridge.families.{name}").architecture
    config = {**BASE, "rms_norm_eps": 1e-6, "num_local_experts": 8, **REFUSED[name][0]}
    read(config)
    with pytest.raises(UsageError) as error:
        read({**config, **change})
    text = str(error.value)
    assert text.count("error[MC512]: the model's config.json has ") == 1
    assert any(f" {key} = {value!r}: " in text for key, value in change.items()), text


def test_groups_of_experts():
    read = import_module("mcore_hfbridge.families.deepseek_v3").architecture
    moe = read({**DEEPSEEK, "n_group": 4, "topk_group": 2}).moe
    assert (moe.num_groups, moe.group_topk, moe.score_function) == (4, 2, "sigmoid")
    moe = read({**DEEPSEEK, "n_group": 4, "topk_group": 4}).moe
    assert (moe.num_groups, moe.group_topk) == (None, None)  # any group may be chosen


def test_mscale_of_yarn():
    read = import_module("mcore_hfbridge.families.deepseek_v3").architecture
    yarn = {"type": "yarn", "factor": 40.0, "mscale_all_dim": 1.0}
    a = read({**DEEPSEEK, "rope_scaling": yarn})
    assert a.softmax_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert read(DEEPSEEK).softmax_scale is None


@pytest.mark.parametrize("spelling", ["rope_parameters", "legacy"])
def test_gemma3_has_two_ropes(spelling):
    read = import_module("mcore_hfbridge.families.gemma3_text").architecture
    linear = {"rope_type": "linear", "factor": 8.0}
    given = {
        "rope_parameters": {
            "rope_parameters": {
                "full_attention": {**linear, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            }
        },
        "legacy": {"rope_theta": 1e5, "rope_local_base_freq": 1e3, "rope_scaling": linear},
    }[spelling]
    a = read({**BASE, **given, "sliding_window_pattern": 3})
    assert (a.rotary_base, a.window_rotary_base, a.rope_scaling) == (1e5, 1e3, linear)
    assert (a.window_size, a.window_layers) == (4096, (0, 1))


def test_internlm3_reads_both_spellings_of_its_biases():
    read = import_module("mcore_hfbridge.families.internlm3").architecture
    a = read({**BASE, "qkv_bias": True, "bias": False})
    assert (a.add_qkv_bias, a.attention_output_bias, a.mlp_bias) == (True, False, False)
    a = read({**BASE, "attention_bias": True, "mlp_bias": True})
    assert (a.add_qkv_bias, a.attention_output_bias, a.mlp_bias) == (True, True, True)


def test_partial_rope():
    for name, expected in (("glm", 0.5), ("stablelm", 0.25), ("phi3", 1.0), ("qwen3_next", 0.25)):
        read = import_module(f"mcore_hfbridge.families.{name}").architecture
        assert read({**BASE, **MOE}).rotary_percent == expected
        assert read({**BASE, **MOE, "partial_rotary_factor": 0.75}).rotary_percent == 0.75
    read = import_module("mcore_hfbridge.families.minimax_m2").architecture
    assert read({**BASE, **MOE, "rotary_dim": 64}).rotary_percent == 0.5


def test_all_problems_at_once():
    message = texts(llama.architecture, hidden_act="mish", vocab_size=-1, mlp_bias=True)
    assert message.count("error[MC512]") == 2


@pytest.fixture(scope="module")
def catalogue():
    manager = PluginManager()
    manager.load_installed()
    out = Catalogue("model family")
    for plugin, components in manager.call_each("mcore_model_specs"):
        for component in components:
            out.add(plugin, component)
    return out


def test_resolve(catalogue):
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    assert resolve_family(config, catalogue).name == "qwen3"
    assert resolve_family({"model_type": "llama"}, catalogue).name == "llama"
    assert resolve_family({"architectures": ["Qwen2ForCausalLM"]}, catalogue).name == "qwen2"
    assert resolve_family(config, catalogue, "llama").name == "llama"
    assert resolve_family({"architectures": ["LlamaForCausalLM"]}, catalogue).name == "llama"
    config = {"model_type": "internlm3", "architectures": ["LlamaForCausalLM"]}
    assert resolve_family(config, catalogue).name == "internlm3"
    config = {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}
    assert resolve_family(config, catalogue).name == "kimi_k2"


def test_unknown_architecture(catalogue):
    with pytest.raises(UsageError) as error:
        resolve_family({"model_type": "qwen", "architectures": ["Qwen3ForCausalLN"]}, catalogue)
    text = str(error.value)
    assert text.startswith(
        "error[MC511]: the model's config.json has architecture 'Qwen3ForCausalLN' (model_type "
        "'qwen'), which no family reads"
    )
    assert "known: CwmForCausalLM, DeepseekV2ForCausalLM, " in text
    assert "did you mean: Qwen3ForCausalLM" in text


def test_a_head_that_the_family_does_not_have_is_unknown(catalogue):
    config = {"model_type": "llama", "architectures": ["LlamaForQuestionAnswering"]}
    with pytest.raises(UsageError, match="LlamaForQuestionAnswering"):
        resolve_family(config, catalogue)


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaModel"])
def test_a_head_other_than_the_language_model_s(catalogue, name):
    config = {"model_type": "llama", "architectures": [name]}
    assert resolve_family(config, catalogue).name == "llama"


def test_model_folder(tmp_path, monkeypatch):
    (tmp_path / "smol").mkdir()
    assert resolve_model_dir(str(tmp_path / "smol")) == tmp_path / "smol"
    with pytest.raises(UsageError, match=r"no such folder\n  did you mean: .*/smol"):
        resolve_model_dir(str(tmp_path / "smoll"))
    with pytest.raises(UsageError, match="use_hf false"):
        resolve_model_dir("org/name", use_hf=False)
    (tmp_path / "f").write_text("")
    with pytest.raises(UsageError, match="is a file, not a folder"):
        resolve_model_dir(str(tmp_path / "f"))


def test_offline_hub_is_a_clear_message(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UsageError) as error:
        resolve_model_dir("org/name", revision="v1")
    assert str(error.value) == (
        "error[MC514]: --model org/name at revision 'v1' is not a folder here and cannot be "
        "fetched from the hub\n  ConnectionError: no route\n"
        "  fix: give a local folder, or run once with network so that it is cached"
    )


def test_config_json(tmp_path):
    with pytest.raises(UsageError, match=r"MC510.*has no config\.json"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"MC510.*cannot be read as JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UsageError, match="holds a list, not an object"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    assert read_hf_config(tmp_path) == BASE
