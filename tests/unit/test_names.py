"""Canonical names count layers as the HF model does."""

from types import SimpleNamespace

import pytest

from mcore_core import compat

compat.apply()  # before anything imports megatron

import torch  # noqa: E402

from mcore_core.model.names import EMBEDDING, canonical, named_weights, unwrap  # noqa: E402


@pytest.mark.parametrize(
    ("name", "first", "want"),
    [
        (
            "decoder.layers.0.self_attention.linear_qkv.weight",
            0,
            "decoder.layers.0.self_attention.linear_qkv.weight",
        ),
        ("decoder.layers.1.mlp.linear_fc1.weight", 0, "decoder.layers.0.mlp.linear_fc1.weight"),
        (
            "decoder.layers.2.self_attention.linear_proj.weight",
            5,
            "decoder.layers.6.self_attention.linear_proj.weight",
        ),
        ("decoder.layers.11.mlp.linear_fc2.bias", 2, "decoder.layers.7.mlp.linear_fc2.bias"),
        ("decoder.layers.0.input_layernorm.weight", 3, "decoder.layers.3.input_layernorm.weight"),
        (
            "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
            3,
            "decoder.layers.3.input_layernorm.weight",
        ),
        (
            "decoder.layers.0.self_attention.linear_qkv.layer_norm_bias",
            3,
            "decoder.layers.3.input_layernorm.bias",
        ),
        (
            "decoder.layers.3.mlp.linear_fc1.layer_norm_weight",
            0,
            "decoder.layers.1.pre_mlp_layernorm.weight",
        ),
        (
            "decoder.layers.3.pre_mlp_layernorm.weight",
            0,
            "decoder.layers.1.pre_mlp_layernorm.weight",
        ),
        ("decoder.final_norm.weight", 4, "decoder.final_norm.weight"),
        ("output_layer.weight", 4, "output_layer.weight"),
        (EMBEDDING, 0, EMBEDDING),
    ],
)
def test_canonical(name, first, want):
    assert canonical(name, first) == want


class Chunk(torch.nn.Module):
    def __init__(self, names, first_layer, *, tied=False):
        super().__init__()
        self.first_layer, self.share_embeddings_and_output_weights = first_layer, tied
        for name in names:
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, torch.nn.Parameter(torch.zeros(1)))


def test_named_weights_over_wrapped_chunks():
    a = Chunk([EMBEDDING, "decoder.layers.0.input_layernorm.weight"], 0)
    b = Chunk(["decoder.layers.0.input_layernorm.weight", "output_layer.weight"], 7)
    wrapped = SimpleNamespace(module=SimpleNamespace(module=b))
    assert unwrap(wrapped) is b
    weights = named_weights([a, wrapped])
    assert list(weights) == [
        EMBEDDING,
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.7.input_layernorm.weight",
        "output_layer.weight",
    ]
    assert weights["output_layer.weight"] is b.output_layer.weight


def test_the_copy_of_tied_embeddings_has_the_name_of_the_embedding():
    last = Chunk(["output_layer.weight"], 2, tied=True)
    assert list(named_weights([last])) == [EMBEDDING]
