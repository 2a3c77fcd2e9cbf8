"""The native engine: tokens and log-probabilities equal transformers', whatever the layout."""

import dataclasses

import numpy as np
import pytest
import torch
from family_cases import CASES, family_of, write
from native_cases import Characters, drain, engine_of, generate, greedy_of, prompts, requests_of

from mcore_core.parallel.topology import Layout
from mcore_core.protocols import Sampling
from mcore_core.testing.ranks import fork_ranks

FAMILIES = ("qwen3", "qwen3_moe", "deepseek_v3", "gpt_oss", "gemma3_text", "mistral", "qwen3_next")
TOKENS = 12
GREEDY = Sampling(max_tokens=TOKENS, temperature=0)
WARM = Sampling(max_tokens=TOKENS, temperature=0.8, top_k=20, top_p=0.95, seed=3)


def check(found, expected, limit):
    for one, (ids, logps) in zip(found, expected, strict=True):
        assert one.token_ids == ids
        assert np.abs(one.logps - logps).max() < limit
        assert one.stop == "length"
        assert one.trainable.all()
        assert (one.versions == 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_equals_transformers(tmp_path, name):
    case = CASES[name]
    model = write(tmp_path / "model", case)
    expected = greedy_of(model, prompts(), TOKENS)

    def run(_):
        return generate(engine_of(tmp_path / "model", family_of(case)), prompts(), GREEDY)

    check(fork_ranks(run, 1)[0], expected, 5e-5)


def scores(model, token_ids, completions, temperature):
    """Return the log-probabilities of completions in whole forward passes of transformers."""
    found = []
    for ids, one in zip(token_ids, completions, strict=True):
        whole = torch.tensor([[*ids, *one.token_ids]])
        with torch.no_grad():
            logps = (model(whole).logits[0].float() / temperature).log_softmax(-1)
        picked = logps[:-1].gather(-1, whole[0, 1:, None]).squeeze(-1)
        found.append(picked[len(ids) - 1 :].numpy())
    return found


LAYOUTS = {
    "tp2": Layout(world=2, tp=2),
    "tp2-sp": Layout(world=2, tp=2, sp=True),
    "pp2": Layout(world=2, pp=2),
    "cp2": Layout(world=2, cp=2),
    "dp2": Layout(world=2),
    "ep2": Layout(world=2, ep=2),
    "tp2-ep2-sp": Layout(world=2, tp=2, ep=2, sp=True),
    "tp2-pp2-sp": Layout(world=4, tp=2, pp=2, sp=True),
    "pp2-ep2": Layout(world=4, pp=2, ep=2),
    "cp2-ep2": Layout(world=4, cp=2, ep=2),
}
MOE = ("ep2", "tp2-ep2-sp", "pp2-ep2", "cp2-ep2")


def sizes_of(layout):
    names = ("world", "tp", "pp", "cp", "ep", "sp")
    return {n: getattr(layout, n) for n in names}


def part(rank, layout):
    """Return which prompts a rank's data-parallel rank generates for."""
    dp = rank // (layout.tp * layout.cp) % layout.dp if layout.dp > 1 else 0
    return dp, prompts()[dp :: layout.dp]


def in_layout(folder, case, layout, sampling, **options):
    """Return each data-parallel rank's completions; its other ranks must have the same."""

    def run(rank):
        engine = engine_of(folder, family_of(case), options=options, **sizes_of(layout))
        dp, mine = part(rank, layout)
        engine.submit([r for r in requests_of(prompts(), sampling) if r.token_ids in mine])
        return dp, drain(engine)

    by_dp = {}
    for dp, found in fork_ranks(run, layout.world):
        before = by_dp.setdefault(dp, found)
        assert before.keys() == found.keys()
        for name, one in found.items():
            assert one.token_ids == before[name].token_ids
            assert np.array_equal(one.logps, before[name].logps)
    together = {n: c for found in by_dp.values() for n, c in found.items()}
    return [together[f"r{i}"] for i in range(len(prompts()))]


PAIRS = [
    ("qwen3", "tp2"),
    ("qwen3", "pp2"),
    ("qwen3_moe", "ep2"),
]
GRID = [
    (name, layout)
    for name in ("qwen3", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next")
    for layout in LAYOUTS
    if (name, layout) not in PAIRS and (name != "qwen3" or layout not in MOE)
]


def check_layout(tmp_path, name, layout):
    """Sampled tokens are one rank's, and their log-probabilities those of a whole forward pass."""
    case = CASES[name]
    changes = {"num_hidden_layers": 4} if LAYOUTS[layout].pp > 2 else {}
    model = write(tmp_path / "model", case, **changes)
    one = in_layout(tmp_path / "model", case, Layout(), WARM)
    found = in_layout(tmp_path / "model", case, LAYOUTS[layout], WARM)
    assert [c.token_ids for c in found] == [c.token_ids for c in one]
    expected = scores(model, prompts(), found, WARM.temperature)
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a.logps - b).max() < 3e-5
    for a, b in zip(found, one, strict=True):
        assert np.abs(a.logps - b.logps).max() < 1e-5


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_layout(tmp_path, name, layout):
    check_layout(tmp_path, name, layout)


@pytest.mark.parity
@pytest.mark.parametrize(("name", "layout"), GRID)
def test_grid(tmp_path, name, layout):
    check_layout(tmp_path, name, layout)


@pytest.mark.parity
@pytest.mark.parametrize(("name", "layout"), [*PAIRS, ("qwen3", "cp2"), ("qwen3", "dp2")])
def test_penalties_and_ends_in_layouts(tmp_path, name, layout):
    """repetition_penalty and stop words give one rank's tokens."""
    write(tmp_path / "model", CASES[name])
    penalty = dataclasses.replace(WARM, repetition_penalty=1.6)
    free = in_layout(tmp_path / "model", CASES[name], Layout(), WARM)
    long = in_layout(tmp_path / "model", CASES[name], Layout(), penalty)
    assert [c.token_ids for c in free] != [c.token_ids for c in long]
    word = Characters().decode(long[0].token_ids[4:6])
    ends = dataclasses.replace(
        penalty, stop=(word, "never"), stop_token_ids=(long[1].token_ids[7],)
    )
    one = in_layout(tmp_path / "model", CASES[name], Layout(), ends)
    assert [one[i].stop for i in (0, 1)] == ["stop", "stop"]
    assert len(one[0].token_ids) <= 6 and len(one[1].token_ids) <= 8
    found = in_layout(tmp_path / "model", CASES[name], LAYOUTS[layout], ends)
    assert [(c.token_ids, c.stop) for c in found] == [(c.token_ids, c.stop) for c in one]
    for a, b in zip(found, one, strict=True):
        assert np.abs(a.logps - b.logps).max() < 1e-5


def _behaviour(folder, family):
    """Return what one engine does under many conditions, on one rank."""
    engine = engine_of(folder, family, options={"native_slots": 3})
    many = prompts(5, (4, 11, 6, 3, 8, 5, 9, 7, 12, 2)) * 2
    found = {"together": generate(engine, many, WARM, prefix="a")}
    found["alone"] = [c for i, p in enumerate(many) for c in _one(engine, p, f"a{i}")]
    found["other seed"] = generate(engine, many, Sampling(max_tokens=TOKENS, seed=4), prefix="a")
    # uneven limits: slots free up at different steps
    limits = [Sampling(max_tokens=1 + 3 * (i % 4), temperature=0) for i in range(len(many))]
    engine.submit(
        [r for i, p in enumerate(many) for r in requests_of([p], limits[i], prefix=f"l{i}-")]
    )
    found["limits"] = drain(engine)
    found["greedy"] = generate(engine, many, GREEDY)
    return many, found


def _one(engine, prompt, name):
    from mcore_core.protocols import Request

    engine.submit([Request(name, prompt, WARM)])
    return drain(engine).values()


def test_refilled_slots_equal_one_by_one(tmp_path):
    write(tmp_path / "model", CASES["qwen3"])
    ((many, found),) = fork_ranks(
        lambda _: _behaviour(tmp_path / "model", family_of(CASES["qwen3"])), 1
    )
    for a, b in zip(found["together"], found["alone"], strict=True):
        assert a.token_ids == b.token_ids
        assert np.abs(a.logps - b.logps).max() < 1e-5
    tokens = [c.token_ids for c in found["together"]]
    assert len(set(tokens)) == len(many), "copies of a prompt have random numbers of their own"
    assert tokens != [c.token_ids for c in found["other seed"]]
    for i in range(len(many)):
        limited = found["limits"][f"l{i}-0"]
        assert limited.token_ids == found["greedy"][i].token_ids[: 1 + 3 * (i % 4)]


def test_memory_and_graphs(tmp_path):
    """Less room is fewer completions beside each other, and the same tokens."""
    write(tmp_path / "model", CASES["qwen3"])

    def with_options(**options):
        def run(_):
            engine = engine_of(tmp_path / "model", family_of(CASES["qwen3"]), options=options)
            done = generate(engine, prompts(), WARM)
            return engine._most, engine.unrecorded, [c.token_ids for c in done]

        return fork_ranks(run, 1)[0]

    most, why, tokens = with_options()
    few, _, again = with_options(native_kv_gib=1e-5)
    _, off, eager = with_options(native_cuda_graphs=False)
    assert most > len(prompts()) > few == 1
    assert tokens == again == eager
    assert off == "native_cuda_graphs is off" != why


def _ends(folder, family):
    engine = engine_of(folder, family, options={"native_slots": 4})
    free = generate(engine, prompts(), GREEDY)
    # end at a token, and at a string of two letters, that the free ones have in their middle
    tokens = free[0].token_ids
    by_token = generate(
        engine, prompts(), Sampling(max_tokens=TOKENS, temperature=0, stop_token_ids=(tokens[5],))
    )
    text = "".join(chr(64 + t) for t in tokens[6:8])
    by_string = generate(
        engine, prompts(), Sampling(max_tokens=TOKENS, temperature=0, stop=("never", text))
    )
    penalty = generate(
        engine, prompts(), Sampling(max_tokens=TOKENS, temperature=0, repetition_penalty=2.5)
    )
    engine.submit(requests_of(prompts(), GREEDY))
    engine.poll(wait=False)
    engine.poll(wait=False)
    engine.cancel(["r1", "r5", "unknown"])
    cancelled = drain(engine)
    engine.submit(requests_of(prompts(), GREEDY))
    for _ in range(4):
        engine.poll(wait=False)
    engine.update_weights(step=7)
    engine.sleep()
    engine.wake()
    renewed = drain(engine)
    assert engine.poll() == []
    nothing = generate(engine, prompts()[:1], Sampling(max_tokens=0))
    return free, by_token, by_string, penalty, cancelled, renewed, nothing


def test_ends_and_interruptions(tmp_path):
    model = write(tmp_path / "model", CASES["qwen3"])
    ((free, by_token, by_string, penalty, cancelled, renewed, nothing),) = fork_ranks(
        lambda _: _ends(tmp_path / "model", family_of(CASES["qwen3"])), 1
    )
    stop = free[0].token_ids[5]
    pair = free[0].token_ids[6:8]
    for a, b, c in zip(free, by_token, by_string, strict=True):
        n = a.token_ids.index(stop) + 1 if stop in a.token_ids else TOKENS
        assert b.token_ids == a.token_ids[:n]
        assert b.stop == ("stop" if stop in a.token_ids else "length")
        at = [i for i in range(TOKENS - 1) if a.token_ids[i : i + 2] == pair]
        assert c.token_ids == a.token_ids[: at[0] + 2 if at else TOKENS]
        assert c.stop == ("stop" if at else "length")
    assert by_string[0].stop == "stop"
    for ids, one in zip(prompts(), penalty, strict=True):
        out = model.generate(
            torch.tensor([ids]),
            do_sample=False,
            max_new_tokens=TOKENS,
            repetition_penalty=2.5,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert one.token_ids == tuple(out[0, len(ids) :].tolist())
    assert cancelled["r1"].stop == "cancelled"
    assert cancelled["r1"].token_ids == free[1].token_ids[:2]
    assert cancelled["r5"].token_ids == (), "it was still waiting for a slot"
    assert [cancelled[f"r{i}"].token_ids for i in (0, 2, 3, 4)] == [
        free[i].token_ids for i in (0, 2, 3, 4)
    ]
    for i, one in enumerate(free):
        again = renewed[f"r{i}"]
        assert again.token_ids == one.token_ids
        assert np.abs(again.logps - one.logps).max() < 1e-5
    assert renewed["r0"].versions.tolist() == [0] * 4 + [7] * 8
    assert nothing[0].token_ids == ()
    assert nothing[0].stop == "length"
