"""The native engine and the divergence on a CUDA device."""

import pytest
import torch
from family_cases import CASES, family_of, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FAMILIES = ("qwen3", "qwen3_moe", "deepseek_v3", "gpt_oss", "gemma3_text", "qwen3_next")
TOKENS = 12


@pytest.fixture(scope="module")
def groups():
    """Megatron's groups of this process alone."""
    from mcore_core import compat
    from mcore_core.platform import install

    platform = install()
    compat.apply()
    from mcore_core.parallel.state import initialize, shut_down
    from mcore_core.parallel.topology import Layout

    initialize(platform, Layout())
    yield platform
    shut_down()


def build(folder, family, platform, dtype):
    """Return an engine over chunks as training wraps them, and the plan."""
    from mcore_hfbridge.bridge import HFBridge
    from mcore_rlhf.rollout.native.config import NativeConfig
    from mcore_rlhf.rollout.native.engine import NativeEngine

    from mcore_core.config.kernel import kernel_config
    from mcore_core.model.build import ModelPlan
    from mcore_core.model.resolve import read_hf_config
    from mcore_core.parallel.topology import Layout
    from mcore_core.protocols import EngineContext
    from mcore_core.train.build import build_model, wrap

    architecture = family.architecture(read_hf_config(folder))
    config = kernel_config(NativeConfig, model=str(folder), native_slots=4)
    plan = ModelPlan(
        architecture=architecture,
        layout=Layout(),
        stage_layers=[architecture.num_layers],
        dtype=dtype,
        transformer_engine=False,
    )
    bare = build_model(plan, config, on_cpu=False)
    bridge = HFBridge(family, architecture)
    bridge.load(bare, folder)
    context = EngineContext(
        config=config,
        chunks=wrap(bare, config),
        plan=plan,
        device=platform.device(),
        tokenizer=None,
        bridge=bridge,
        model_path=folder,
    )
    engine = NativeEngine(context)
    engine.update_weights(step=0)
    return engine


def forward_logps(engine, prompts, completions, temperature):
    """Return the log-probabilities of a training forward pass over one packed row."""
    from mcore_core.model.packed import PackedRow

    whole = [[*p, *c.token_ids] for p, c in zip(prompts, completions, strict=True)]
    cu = [0]
    for ids in whole:
        cu.append(cu[-1] + len(ids))
    tokens = torch.tensor([t for ids in whole for t in ids], device="cuda")
    positions = torch.cat([torch.arange(len(ids)) for ids in whole]).cuda()
    decoder = engine.forward.decoders[0].eval()
    with torch.no_grad():
        hidden = decoder(tokens, PackedRow.build(cu, positions))
        logps = (engine.forward.logits(hidden.squeeze(1)) / temperature).log_softmax(-1)
    found = []
    for start, prompt, one in zip(cu, prompts, completions, strict=False):
        at = torch.arange(start + len(prompt), start + len(prompt) + len(one.token_ids)).cuda()
        found.append(logps[at - 1].gather(-1, tokens[at, None]).squeeze(-1).cpu().numpy())
    return found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logps_are_those_of_training(tmp_path, groups, name, dtype):
    import numpy as np

    from mcore_core.protocols import Request, Sampling

    case = CASES[name]
    write(tmp_path / "model", case)
    engine = build(tmp_path / "model", family_of(case), groups, dtype)
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(3, 100, n).tolist()) for n in (5, 9, 2, 14, 9, 7)]
    sampling = Sampling(max_tokens=TOKENS, temperature=0.8, top_k=20)
    engine.submit([Request(f"r{i}", p, sampling) for i, p in enumerate(prompts)])
    done = {}
    while found := engine.poll():
        done |= {c.id: c for c in found}
    completions = [done[f"r{i}"] for i in range(len(prompts))]
    expected = forward_logps(engine, prompts, completions, 0.8)
    apart = np.concatenate([c.logps - e for c, e in zip(completions, expected, strict=True)])
    if dtype is torch.float32:
        assert np.abs(apart).max() < 2e-4
    else:  # a router's choice may tip over in half precision
        assert np.median(np.abs(apart)) < 0.05


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gpt_oss", "gemma3_text", "qwen3_next"])
def test_recorded_steps_equal_plain_ones(tmp_path, groups, name):
    from mcore_rlhf.rollout.native.graphs import Graphs

    from mcore_core.protocols import Request, Sampling

    case = CASES[name]
    write(tmp_path / "model", case)
    engine = build(tmp_path / "model", family_of(case), groups, torch.bfloat16)
    prompts = [tuple(range(3, 3 + n)) for n in (5, 9, 2, 14, 9, 7)]
    greedy = Sampling(max_tokens=2 * TOKENS, temperature=0)
    warm = Sampling(max_tokens=2 * TOKENS, temperature=0.9, top_k=30, top_p=0.9)
    found = []
    for graphs in (Graphs(engine.device), None):
        engine.sleep()
        engine._steps.graphs = graphs
        for sampling in (greedy, warm):
            engine.submit([Request(f"r{i}", p, sampling) for i, p in enumerate(prompts)])
            done = {}
            while some := engine.poll():
                done |= {c.id: c for c in some}
            found.append([done[f"r{i}"] for i in range(len(prompts))])
        if graphs is not None and engine.unrecorded is None:
            assert len(graphs) >= 2, "nothing was recorded"
    for recorded, plain in zip(found[:2], found[2:], strict=True):
        same = [a.token_ids == b.token_ids for a, b in zip(recorded, plain, strict=True)]
        assert all(same)


def test_a_step_that_cannot_be_recorded_runs_all_the_same(caplog):
    from mcore_rlhf.rollout.native.graphs import Graphs

    value = torch.ones(1, device="cuda")
    graphs = Graphs(torch.device("cuda", torch.cuda.current_device()))
    for _ in range(4):
        graphs.run("fetches", lambda: value.add_(float(value)))
    assert float(value) == 16
    assert len(graphs) == 0
    assert len(caplog.records) == 1
    torch.manual_seed(1)
    drawn = torch.rand(4, device="cuda")
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(4, device="cuda"))
    other = Graphs(torch.device("cuda", torch.cuda.current_device()))
    for _ in range(4):
        other.run("works", lambda: value.mul_(2))
    assert float(value) == 256
    assert len(other) == 1
    other.clear()
    for _ in range(4):
        other.run("works", lambda: value.div_(2))
    assert float(value) == 16
    assert len(other) == 1, "nothing was recorded after a pause"


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("heads", "groups_", "size"), [(16, 8, 128), (4, 4, 64), (8, 1, 256)])
def test_the_kernel_of_a_step(heads, groups_, size, window, sinks):
    """FlashAttention over slots of different lengths against the plain computation in float32."""
    from mcore_core.model.decode import DecodeState, Kept, attend, attend_step, visible
    from mcore_core.model.packed import PackedRow

    torch.manual_seed(0)
    slots, capacity = 5, 192
    positions = torch.tensor([0, 191, 7, 64, 100], device="cuda")
    query = torch.randn(slots, heads, size, device="cuda").bfloat16()
    kept = tuple(
        torch.randn(slots + 2, groups_, capacity, size, device="cuda").bfloat16() for _ in range(2)
    )
    offset = torch.randn(heads, device="cuda").bfloat16() if sinks else None
    row = PackedRow(qkv_format="thd", positions_T=positions)
    where = torch.arange(slots, device="cuda")
    row.kept = Kept(DecodeState(slots, capacity), where, positions, keys=capacity)
    given = {"scale": size**-0.5, "sinks": offset}
    found = attend_step(query, kept, row, window=window, **given)
    seen = visible(row, row.kept, window, torch.float32)
    wide = tuple(t.float() for t in kept)
    expected = attend(query.float(), wide, seen, **given)
    assert (found.float() - expected).abs().max() < 2e-2


def test_divergence_of_half_precision(groups):
    """The compiled kernels against float64 on the same numbers."""
    from mcore_core.model.divergence import Teacher
    from mcore_core.model.head import VocabRange, local_loss
    from mcore_core.protocols import Divergence, HeadSpec, LossOutput

    torch.manual_seed(0)
    tokens, vocab, common = 700, 3000, 2900
    hidden = torch.randn(tokens, 64, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocab, 64, device="cuda") / 4).bfloat16().requires_grad_()
    theirs = torch.randn(tokens, 96, device="cuda").bfloat16()
    their_weight = (torch.randn(common, 96, device="cuda") / 5).bfloat16()
    for beta in (0.0, 0.4, 1.0):
        spec = Divergence(model="teacher", beta=beta, temperature=0.9)
        teacher = Teacher(
            hidden_TH=theirs,
            weight=their_weight,
            vocab=VocabRange(start=0, rows=common),
            spec=spec,
        )
        out = local_loss(
            hidden,
            weight,
            torch.zeros(tokens, dtype=torch.long, device="cuda"),
            lambda out, _: LossOutput(out.divergence_T.sum(), out.divergence_T.sum() * 0 + 1),
            vocab=VocabRange(start=0, rows=vocab),
            spec=HeadSpec(divergence=spec),
            teacher=teacher,
        )
        found = torch.autograd.grad(out.total, (hidden, weight))
        a = hidden.detach().double().requires_grad_()
        b = weight.detach().double().requires_grad_()
        student = (a @ b.T)[:, :common].div(0.9).log_softmax(-1)
        taught = (theirs.double() @ their_weight.double().T).div(0.9).log_softmax(-1)
        mixture = student if beta == 0 else taught
        if 0 < beta < 1:
            mixture = ((1 - beta) * student.exp() + beta * taught.exp()).log()
        of_teacher = (taught.exp() * (taught - mixture)).sum()
        of_student = (student.exp() * (student - mixture)).sum()
        expected = {0.0: of_teacher, 1.0: of_student}.get(
            beta, beta * of_teacher + (1 - beta) * of_student
        )
        wanted = torch.autograd.grad(expected, (a, b))
        assert out.total.item() == pytest.approx(expected.item(), rel=1e-2)
        for mine, right in zip(found, wanted, strict=True):
            assert (mine.double() - right).norm() < 2e-2 * right.norm()
