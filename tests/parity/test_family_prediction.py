"""Multi-token prediction against a float64 reference, and its checkpoints on real ranks."""

import copy

import pytest
import torch
from family_cases import CASES, family_of, tensors_of
from family_mtp import WRITERS, write_mtp
from family_runs import LENGTHS, build, tokens_and_weights

from mcore_core.testing.ranks import fork_ranks

QWEN = ("mtp.", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
DEEPSEEK = ("model.layers.2.", "enorm", "hnorm", "eh_proj", "shared_head.norm")
MIMO = ("model.mtp_layers.0.", "token_layernorm", "hidden_layernorm", "input_proj")
OUTER = {
    "deepseek_v3": DEEPSEEK,
    "kimi_k2": DEEPSEEK,
    "glm4_moe": DEEPSEEK,
    "hy_v3": (*DEEPSEEK[:-1], "final_layernorm"),
    "qwen3_next": QWEN,
    "qwen3_5_text": QWEN,
    "qwen3_5_moe_text": QWEN,
    "exaone_moe": QWEN,
    "mimo": (*MIMO, "final_layernorm"),
    "ernie4_5_moe": ("model.", "mtp_emb_norm.0", "mtp_hidden_norm.0", "mtp_linear_proj.0", "norm"),
}


WINDOWS = {"exaone_moe": 5}
"""Of inner layers whose attention is windowed."""


def outer_of(name, tensors):
    """Return the norm of embeddings, the norm of hidden states, the projection, the last norm."""
    prefix, *names = OUTER[name]
    return [tensors[f"{prefix}{n}.weight"].double() for n in names]


def reference(name, model, inner, tensors, tokens_T, later_T):
    """Return the logits of the second next token, float64: transformers' layers put together."""
    other, number = inner
    model, other = model.double(), other.double()
    window = WINDOWS.get(name, sum(LENGTHS))
    enorm, hnorm, project, last = outer_of(name, tensors)

    def norm(weight, x):
        module = copy.deepcopy(model.model.norm)
        module.weight.copy_(weight)
        return module(x)

    parts = []
    for tokens, later in zip(tokens_T.split(LENGTHS), later_T.split(LENGTHS), strict=True):
        hidden = model.model(tokens[None]).last_hidden_state
        embedded, hidden = norm(enorm, model.model.embed_tokens(later[None])), norm(hnorm, hidden)
        both = (hidden, embedded) if name == "mimo" else (embedded, hidden)
        x = torch.cat(both, -1) @ project.T
        positions = torch.arange(len(tokens))[None]
        outside = torch.full((len(tokens),) * 2, float("-inf"), dtype=torch.float64)
        mask = outside.triu(1) + outside.tril(-window)
        x = other.model.layers[number](
            x,
            attention_mask=mask[None, None],
            position_ids=positions,
            position_embeddings=other.model.rotary_emb(x, positions),
        )
        parts.append(norm(last, x)[0] @ model.lm_head.weight.T)
    return torch.cat(parts)


def _run(folder, family, tokens_T, later_T):
    from mcore_core.model.packed import PackedRow

    bridge, (chunk,) = build(folder, family)
    bridge.load([chunk], folder)
    chunk.eval()
    row = PackedRow.build(
        [0, LENGTHS[0], sum(LENGTHS)], torch.cat([torch.arange(n) for n in LENGTHS])
    )
    hidden = chunk(tokens_T, row, ahead=[later_T]).squeeze(1)[len(tokens_T) :]
    return (hidden @ chunk.head_weight().T)[:, :101].detach()


@pytest.mark.parametrize("name", WRITERS)
def test_predictions_equal_a_float64_reference(tmp_path, name):
    model, inner, tensors = write_mtp(tmp_path, name)
    tokens_T, _ = tokens_and_weights()
    later_T = torch.cat([torch.cat((t[1:], t.new_zeros(1))) for t in tokens_T.split(LENGTHS)])
    with torch.no_grad():
        expected_TV = reference(name, model, inner, tensors, tokens_T, later_T)
    family = family_of(CASES[name])
    (found_TV,) = fork_ranks(lambda _: _run(tmp_path, family, tokens_T, later_T), 1)
    assert expected_TV.std() >= 1
    assert (found_TV - expected_TV).abs().max() < 1e-4 * expected_TV.std()


LAYOUTS = {
    "tp2-ep2": {"world": 2, "tp": 2, "ep": 2, "sp": True},
    "pp2": {"world": 2, "pp": 2},
    "tp2": {"world": 2, "tp": 2},
}


def _round_trip(folder, out, family, sizes):
    bridge, chunks = build(folder, family, **sizes)
    for chunk in chunks:
        for p in chunk.parameters():
            p.data.fill_(float("nan"))
    bridge.load(chunks, folder)
    bridge.save(chunks, out, max_shard_size=10**8, source=folder)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("deepseek_v3", "tp2-ep2"),
        ("glm4_moe", "pp2"),
        ("qwen3_next", "tp2-ep2"),
        ("mimo", "pp2"),
        ("mimo", "tp2"),
        ("ernie4_5_moe", "tp2-ep2"),
        ("exaone_moe", "pp2"),
        ("qwen3_5_moe_text", "tp2-ep2"),
    ],
)
def test_round_trip(tmp_path, name, layout):
    _, _, tensors = write_mtp(tmp_path / "in", name)
    family, sizes = family_of(CASES[name]), LAYOUTS[layout]
    fork_ranks(
        lambda _: _round_trip(tmp_path / "in", tmp_path / "out", family, sizes), sizes["world"]
    )
    saved = tensors_of(tmp_path / "out")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[k], tensors[k]) for k in tensors)
