"""`mcore plan`: torch-free, the numbers of known models, a ranked list and the reasons."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from mcore_moe.config import MoEConfig

from mcore_core.cli import plan as command
from mcore_core.cli.fit import too_large
from mcore_core.config.kernel import kernel_config
from mcore_core.model.architecture import Architecture
from mcore_core.model.shapes import MoEShape
from mcore_core.parallel.topology import Layout
from mcore_core.planning.activations import Recompute, Rows, ends_bytes, in_flight
from mcore_core.planning.memory import GIB, largest, memory
from mcore_core.planning.search import Cluster, judge, search
from mcore_core.planning.weights import model_parameters

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
DENSE = Architecture(
    num_layers=36,
    hidden_size=4096,
    ffn_hidden_size=12288,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    dtype="bfloat16",
    qk_layernorm=True,
)
EXPERTS = replace(
    DENSE,
    num_layers=48,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_query_groups=4,
    moe=MoEShape(num_experts=128, topk=8, ffn_hidden_size=768, layers=tuple(range(48))),
)


def config(**values):
    given = {"micro_batch_size": 1, "global_batch_size": 128, "max_length": 4096, **values}
    return kernel_config(MoEConfig, **given)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    return folder


def test_parameters_of_known_models():
    """Qwen3-8B has 8,190,735,360 parameters; Qwen3-30B-A3B 30,532,122,624, 3.35B for a token."""
    assert model_parameters(DENSE) == (8_190_735_360, 8_190_735_360)
    assert model_parameters(EXPERTS) == (30_532_122_624, 3_353_032_704)


def test_the_whole_state_of_one_rank():
    """bfloat16 weights, float32 gradients, two moments and a main weight: 18 bytes a parameter."""
    (rank,) = memory(config(), DENSE, Layout(), [36], capacity=80 * GIB)
    state = rank.weights + rank.gradients + rank.optimizer
    assert state == pytest.approx(18 * 8_190_735_360, rel=1e-4)
    assert rank.total > state + rank.activations


def test_recomputing_and_the_head_do_not_stand_at_once():
    """With every layer recomputed the head is done before the first of them runs again."""
    options = {"recompute_granularity": "full", "recompute_method": "uniform"}
    rows = {n: config(recompute_num_layers=n, **options) for n in (1, 12, 36)}
    ranks = {n: memory(c, DENSE, Layout(), [36], capacity=0)[0] for n, c in rows.items()}
    none = config(recompute_granularity="none")
    plain = memory(none, DENSE, Layout(), [36], capacity=0)[0]
    edge = 4096 * 4096 * 2
    above = {n: r.activations + r.logits - (36 // n + 1) * edge for n, r in ranks.items()}
    assert above[1] == plain.logits
    assert ranks[1].logits > 0 == ranks[12].logits
    assert above[36] > above[12] > above[1]


def test_head_and_loss_are_what_an_h100_showed():
    """Peak of a step above what the forward pass kept, bench/plan_gpu.py: 8192 tokens, bfloat16."""
    shape = Architecture(
        num_layers=24, hidden_size=896, ffn_hidden_size=4864, num_attention_heads=14,
        num_query_groups=2, kv_channels=64, vocab_size=151936, max_position_embeddings=32768,
    )  # fmt: skip
    rows = Rows(tokens=8192, size=2, fused=True, recompute=Recompute())
    found = ends_bytes(shape, Layout(), rows, vocab=151936)
    assert found / GIB == pytest.approx(0.913, rel=0.03)


def test_ranks_of_a_pipeline_in_flight():
    pp4 = Layout(world=4, pp=4)
    assert [in_flight(pp4, r, 8) for r in range(4)] == [4, 3, 2, 1]
    assert [in_flight(pp4, r, 2) for r in range(4)] == [2, 2, 2, 1]
    interleaved = replace(pp4, vpp=2)
    assert [in_flight(interleaved, r, 8) for r in range(4)] == [5.5, 4.5, 3.5, 2.5]


def test_layouts_that_fit_come_first_and_the_others_say_why():
    cluster = Cluster(gpus=8, memory=80 * GIB)
    found = search(config(), DENSE, cluster)
    fits = [c for c in found if not c.reason]
    assert fits
    assert found[: len(fits)] == fits
    assert all(c.worst.total <= cluster.memory for c in fits)
    seconds = [c.seconds.total for c in fits]
    assert seconds == sorted(seconds)
    reasons = {str(c.layout): c.reason for c in found[len(fits) :]}
    assert reasons["dp8"].startswith("needs 8")
    assert "most of it gradients (30.5 GiB)" in reasons["dp8"]
    assert "36 layers do not divide over 8 stages" in reasons["pp8"]


def test_experts_are_spread_within_a_machine():
    found = search(config(), EXPERTS, Cluster(gpus=64, memory=80 * GIB))
    assert str(found[0].layout) == "ep8+dp64"
    alone = next(c for c in found if str(c.layout) == "dp64")
    assert "most of it gradients (113.7 GiB)" in alone.reason


def test_less_memory_takes_more_recomputation():
    found = search(config(), DENSE, Cluster(gpus=8, memory=40 * GIB))
    best = found[0]
    assert not best.reason
    assert best.layout.tp * best.layout.pp > 1
    assert not [
        c for c in search(config(), DENSE, Cluster(gpus=1, memory=40 * GIB)) if not c.reason
    ]


def test_a_given_layout():
    given = config(tensor_model_parallel_size=3)
    found = judge(given, DENSE, Cluster(gpus=3, memory=80 * GIB), {})
    assert "global_batch_size 128 is not a multiple" in found.reason or "3 does not" in found.reason
    assert found.ranks == ()
    deep = config(pipeline_model_parallel_size=4)
    ranks = judge(deep, DENSE, Cluster(gpus=4, memory=80 * GIB), {}).ranks
    assert [r.rank for r in ranks] == [0, 1, 2, 3]
    assert ranks[0].activations > ranks[2].activations
    assert ranks[3].logits > ranks[0].logits == 0
    assert largest(ranks).total == max(r.total for r in ranks)


def test_lora_and_a_frozen_model():
    plain = memory(config(), DENSE, Layout(), [36], capacity=80 * GIB)[0]
    lora = memory(config(tuner_type="lora"), DENSE, Layout(), [36], capacity=80 * GIB)[0]
    assert lora.weights == pytest.approx(plain.weights, rel=0.01)
    assert lora.optimizer < plain.optimizer / 100


def test_text(model, capsys):
    assert command.main(["--model", str(model), "--gpus", "8", "--max_length", "4096"]) == 0
    out = capsys.readouterr().out
    assert "Qwen3-8B (qwen3): 8.19B parameters" in out
    assert "layouts fit; the fastest by estimate" in out
    assert "\n  the first: --" in out
    assert "this layout" not in out


def test_json_and_a_layout(model, capsys):
    line = ["--model", str(model), "--gpus", "64", "--gpu_memory", "80", "--json"]
    assert (
        command.main([*line, "--tensor_model_parallel_size", "4", "--global_batch_size", "64"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 8_190_735_360
    assert found["given"]["layout"].startswith("tp4+dp16")
    (rank,) = found["given"]["ranks"]
    assert rank["total"] == sum(
        rank[n]
        for n in (
            "weights", "gradients", "optimizer", "activations", "logits", "engine", "reference",
            "overhead",
        )
    )  # fmt: skip
    fits = [c["fits"] for c in found["layouts"]]
    assert fits == sorted(fits, reverse=True)
    assert all(c["reason"] for c in found["layouts"] if not c["fits"])


def test_what_is_missing(model):
    from mcore_core.errors import UsageError

    with pytest.raises(UsageError, match="mcore plan needs --gpus"):
        command.main(["--model", str(model)])
    with pytest.raises(UsageError, match="mcore plan needs --model"):
        command.main(["--gpus", "8"])


def test_no_torch(model):
    code = (
        "import sys; from mcore_core.cli.main import main; "
        f"main(['plan', '--model', {str(model)!r}, '--gpus', '8']); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


class Machine:
    def __init__(self, name, memory):
        self.name, self.memory = name, memory

    def memory_total(self):
        return self.memory


class Source:
    architecture, layout, stage_layers = DENSE, Layout(world=8), (36,)


def test_a_run_is_warned_before_it_is_built(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    text = too_large(config(), Source, Machine("cuda", 80 * GIB))
    first, parts, fix, others = text.splitlines()
    assert first.startswith("warning[MC630]: each rank will need about 8")
    assert "and its GPU has 80.0: the run may end for lack of memory" in first
    assert "gradients 30.5" in parts
    assert fix.strip().startswith("fix: --")
    assert others.strip() == "mcore plan: others"
    assert too_large(config(), Source, Machine("cuda", 141 * GIB)) is None
    host = too_large(config(), Source, Machine("cpu", 64 * GIB))
    assert host.startswith("warning[MC630]: 8 ranks here will need about")
    assert too_large(config(), Source, Machine("cpu", 4000 * GIB)) is None
