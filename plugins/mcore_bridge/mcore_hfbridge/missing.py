"""Language models of transformers that have no table here, and why: for the reference page."""

from collections.abc import Mapping

MISSING: Mapping[str, tuple[str, ...]] = {
    "attention and MLP stand side by side on one residual stream": (
        "codegen", "cohere", "cohere2", "cohere2_moe", "falcon", "gpt_neox", "gptj", "phi",
    ),
    "there is no norm before attention and MLP, only after them": (
        "exaone4", "flex_olmo", "olmo2", "olmo3",
    ),
    "norms have no weights": ("nanochat", "olmo"),
    "positions are learned or ALiBi, not rotary": (
        "biogpt", "bloom", "cpmant", "ctrl", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "mpt",
        "openai-gpt", "opt", "xglm",
    ),
    "scores or logits are soft-capped": ("gemma2", "vaultgemma"),
    "residual branches or logits are multiplied by constants": (
        "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared",
        "hyperclovax", "minicpm3",
    ),
    "q and k are normalized after the rotation": ("hunyuan_v1_dense", "hunyuan_v1_moe"),
    "the activation (relu2, xIELU) is not built in": ("apertus", "arcee", "jais2", "nemotron"),
    "some layers are state-space models": (
        "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "mamba", "mamba2",
        "nemotron_h", "zamba", "zamba2",
    ),
    "some layers are linear attention of another kind, or convolutions": (
        "bailing_hybrid", "kimi_linear", "lfm2", "lfm2_moe", "minimax", "olmo_hybrid",
        "recurrent_gemma",
    ),
    "attention picks its keys by an indexer": ("deepseek_v32", "deepseek_v4", "glm_moe_dsa"),
    "norms inside latent attention have another epsilon than the others": ("glm4_moe_lite",),
    "attention is in chunks, and its scores are rescaled with the position": (
        "llama4", "llama4_text",
    ),
    "queries are rescaled with the position": ("ministral3",),
    "the router is trained by sparse mixing, and all norms have biases": ("phimoe",),
    "q, k and v are clipped": ("dbrx",),
    "there are norms inside attention and MLP, or several attentions in one": (
        "bitnet", "diffllama",
    ),
    "layers share keys and values, or have inputs of their own": (
        "gemma3n", "gemma3n_text", "gemma4", "gemma4_text",
    ),
    "each layer has several attentions and MLPs": ("longcat_flash",),
    "layers are recurrent": ("rwkv", "xlstm"),
    "they are encoders, or have one": (
        "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot",
        "blenderbot-small", "camembert", "data2vec-text", "electra", "ernie", "marian", "mbart",
        "megatron-bert", "mvp", "pegasus", "plbart", "prophetnet", "reformer", "rembert", "roberta",
        "roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper", "xlm", "xlm-roberta",
        "xlm-roberta-xl", "xlnet", "xmod",
    ),
    "they read or make images or sound: models here read text only": (
        "emu3", "fuyu", "gemma3", "git", "got_ocr2", "mllama", "moshi", "moss_transcribe_diarize",
        "musicgen", "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe",
    ),
    "examples/plugins has the family, as a third party's": ("mellum",),
    "their table has not been written, nor looked into what it needs": (
        "afmoe", "aria_text", "axk1", "axk2", "beam", "blt", "cohere_compass_text", "doge",
        "dots3_note", "dots3_note_text", "flint", "gemma4_assistant", "gemma4_unified",
        "gemma4_unified_assistant", "gemma4_unified_text", "gpt_neox_japanese", "hrm_text", "hy_v4",
        "inkling2_text", "inkling_text", "iquestcoder", "jetmoe", "kolibri1", "laguna", "lfm3",
        "mimo_v2_flash", "minimax_m3_vl_text", "modernbert-decoder", "persimmon", "qwen4_exp",
        "qwen4_exp_text", "zaya",
    ),
}  # fmt: skip
"""Reason -> model_types."""
