"""Multi-token prediction: what each depth reads, predicts and counts, sequence by sequence."""

import pytest
import torch
import torch.nn.functional as F
from layer_cases import LAYOUTS, layer_case

from mcore_core.model.names import named_weights, unwrap
from mcore_core.model.packed import PackedRow
from mcore_core.testing.cases import Session, run_case
from mcore_core.testing.ranks import fork_ranks

FACTOR = 0.5


def reference(name):
    """Loss of every depth over the step's samples, each run by itself, and their counts."""

    def one_rank(_):
        session = Session(layer_case(name), LAYOUTS["one"])
        chunk = unwrap(session.chunks[0])
        depths, words = len(chunk.mtp.layers), session.plan.architecture.vocab_size
        total, count = torch.zeros(depths).double(), torch.zeros(depths).double()
        for unit in (u for micro in session.micros(0) for u in micro):
            ids = torch.from_numpy(unit["input_ids"]).long()
            weights = torch.from_numpy(unit["weights"])
            positions = torch.arange(len(ids))
            row = PackedRow.build([0, len(ids)], positions, torch.ones_like(positions))
            with torch.no_grad():
                hidden = chunk(ids, row)
                for depth, layer in enumerate(chunk.mtp.layers):
                    k = depth + 1
                    later = torch.cat((ids[k:], torch.zeros(min(k, len(ids)), dtype=torch.long)))
                    hidden = layer(hidden, chunk.embed(later), row, chunk.decoder.final_norm)
                    seen = hidden[: max(0, len(ids) - k - 1), 0]
                    logits = seen @ chunk.head_weight()[:words].t()
                    losses = F.cross_entropy(logits, ids[k + 1 :], reduction="none")
                    total[depth] += (losses * weights[k + 1 :]).sum()
                    count[depth] += weights[k + 1 :].sum()
        return total, count, sorted(named_weights(session.chunks))

    return fork_ranks(one_rank, 1)[0]


@pytest.mark.parametrize("name", ["mtp", "mtp-tied", "moe-mtp-dense"])
def test_loss(name):
    total, count, _ = reference(name)
    assert (count > 0).all()
    runs = [
        run_case(layer_case(name, steps=1, mtp_loss_scaling_factor=f), LAYOUTS["one"])
        for f in (0.0, FACTOR)
    ]
    for run in runs:
        found = run.results[0].metrics["mtp_loss"]
        assert found == pytest.approx(float(total.sum() / count.sum()), rel=1e-5)
    assert runs[0].losses == runs[1].losses  # the reported loss is the main one
    key = "mtp.layers.0.enorm.weight"
    assert float(runs[0].gradients[0][key].abs().max()) == 0
    assert float(runs[1].gradients[0][key].abs().max()) > 1e-5


def test_canonical_names():
    _, _, names = reference("mtp")
    inner = "mtp.layers.1.transformer_layer."
    assert {n for n in names if n.startswith("mtp.layers.1.")} == {
        "mtp.layers.1.enorm.weight",
        "mtp.layers.1.hnorm.weight",
        "mtp.layers.1.eh_proj.weight",
        "mtp.layers.1.final_layernorm.weight",
        f"{inner}input_layernorm.weight",
        f"{inner}self_attention.linear_qkv.weight",
        f"{inner}self_attention.q_layernorm.weight",
        f"{inner}self_attention.k_layernorm.weight",
        f"{inner}self_attention.linear_proj.weight",
        f"{inner}pre_mlp_layernorm.weight",
        f"{inner}mlp.linear_fc1.weight",
        f"{inner}mlp.linear_fc2.weight",
    }


def test_names_of_experts():
    """Every rank of the expert-parallel group has its experts' own numbers, as views."""

    def one_rank(_):
        session = Session(layer_case("moe-groups"), LAYOUTS["ep2"])
        weights = named_weights(session.chunks)
        found = sorted(n for n in weights if n.startswith("decoder.layers.1.mlp."))
        with torch.no_grad():
            for name, weight in weights.items():
                if ".experts." in name:
                    weight.fill_(7.0)
        inside = unwrap(session.chunks[0]).decoder.layers[3].mlp.experts.linear_fc1.weight
        return found, weights[found[0]].dtype, bool((inside == 7).all())

    ranks = fork_ranks(one_rank, 2)
    for rank, (found, _, written) in enumerate(ranks):
        assert written
        experts = range(4 * rank, 4 * rank + 4)
        assert set(found) == {
            *(
                f"decoder.layers.1.mlp.experts.{e}.linear_fc{i}.weight"
                for e in experts
                for i in (1, 2)
            ),
            "decoder.layers.1.mlp.router.weight",
            "decoder.layers.1.mlp.router.expert_bias",
            "decoder.layers.1.mlp.shared_experts.linear_fc1.weight",
            "decoder.layers.1.mlp.shared_experts.linear_fc2.weight",
            "decoder.layers.1.mlp.shared_experts.gate_weight",
        }
