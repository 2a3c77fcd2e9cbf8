"""Multi-token prediction against a float64 reference, and its checkpoints on real ranks."""

import copy

import pytest
import torch
from family_cases import CASES, family_of, tensors_of
from family_mtp import WRITERS, write_mtp
from family_runs import LENGTHS, build, tokens_and_weights

from mcore_core.testing.ranks import fork_ranks

OUTER = {
    "deepseek": ("enorm", "hnorm", "eh_proj", "shared_head.norm"),
    "qwen": ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"),
    "mimo": ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
}


def outer_of(name, tensors):
    """Return the norm of embeddings, the norm of hidden states, the projection, the last norm."""
    kind = {"qwen3_next": "qwen", "mimo": "mimo"}.get(name, "deepseek")
    prefix = {"qwen": "mtp.", "mimo": "model.mtp_layers.0."}.get(kind, "model.layers.2.")
    return [tensors[f"{prefix}{n}.weight"].double() for n in OUTER[kind]]


def reference(name, model, other, tensors, tokens_T, later_T):
    """Return the logits of the second next token, float64: transformers' layers put together."""
    model, other = model.double(), other.double()
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
        mask = torch.full((len(tokens),) * 2, float("-inf")).triu(1)[None, None].double()
        x = other.model.layers[-1](
            x,
            attention_mask=mask,
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
    model, other, tensors = write_mtp(tmp_path, name)
    tokens_T, _ = tokens_and_weights()
    later_T = torch.cat([torch.cat((t[1:], t.new_zeros(1))) for t in tokens_T.split(LENGTHS)])
    with torch.no_grad():
        expected_TV = reference(name, model, other, tensors, tokens_T, later_T)
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
