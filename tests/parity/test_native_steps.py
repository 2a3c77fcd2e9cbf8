"""Steps as a GPU runs them, on the CPU: padded, several between two looks, nothing fetched.

What a CUDA graph records must not ask the device for a value: a stand-in for the recorder refuses
every call that would.
"""

import numpy as np
import pytest
import torch
from family_cases import CASES, family_of, write
from native_cases import as_on_a_gpu, drain, engine_of, generate, prompts
from torch.overrides import TorchFunctionMode

from mcore_core.parallel.topology import Layout
from mcore_core.protocols import Request, Sampling
from mcore_core.testing.ranks import fork_ranks

FAMILIES = ("qwen3", "qwen3_moe", "deepseek_v3", "gpt_oss", "gemma3_text", "mistral", "qwen3_next")
TOKENS = 12
FETCHING = {
    *("item", "tolist", "__bool__", "__int__", "__index__", "__float__", "cpu", "numpy"),
    *("nonzero", "masked_select", "unique", "bincount", "repeat_interleave", "argwhere"),
    *("tensor", "as_tensor", "from_numpy", "equal", "is_nonzero", "__contains__"),
}


class NothingFetched(TorchFunctionMode):
    """Refuses what would make the host wait for the device, or copy from it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        fixed = name == "repeat_interleave" and isinstance(args[1], int)
        if name in FETCHING and not fixed:
            raise AssertionError(f"{name} in a step")
        return function(*args, **(kwargs or {}))


class Recorder:
    """Stands in for CUDA graphs: a second step of a key must find everything where it was."""

    def __init__(self):
        self.keys, self.recorded = {}, 0

    def run(self, key, step):
        closure = dict(zip(step.__code__.co_freevars, step.__closure__, strict=True))
        tensors = [*closure["self"].cell_contents._ints, closure["self"].cell_contents._out]
        tensors += closure["choice"].cell_contents.tensors.values()
        state = closure["state"].cell_contents
        tensors += [t for kept in state._kept.values() for t in kept]
        where = [(t.data_ptr(), t.shape, t.stride()) for t in tensors]
        self.recorded += key not in self.keys
        assert self.keys.setdefault(key, where) == where, "something has moved"
        with NothingFetched():
            step()

    def clear(self):
        self.keys = {}


def grouped_by_token(x, weight, counts, *, grouped=True):
    """The product of experts without a count on the host, as the grouped kernel has it."""
    if not isinstance(counts, torch.Tensor):
        parts = zip(torch.split(x, counts), weight.unbind(0), strict=True)
        return torch.cat([a @ w.t() for a, w in parts])
    index = torch.searchsorted(counts, torch.arange(len(x), dtype=counts.dtype), right=True)
    return torch.bmm(x.unsqueeze(1), weight[index].transpose(1, 2)).squeeze(1)


def settings(number):
    """Return sampling that differs by request: limits, filters, penalties, greedy ones."""
    kinds = (
        Sampling(max_tokens=TOKENS, temperature=0),
        Sampling(max_tokens=7, temperature=0.8, top_k=20, top_p=0.95, seed=3),
        Sampling(max_tokens=TOKENS + 3, temperature=1.2, repetition_penalty=1.4),
        Sampling(max_tokens=1, temperature=0.7),
    )
    return [kinds[i % len(kinds)] for i in range(number)]


def _both(folder, family):
    """Return the same requests by plain steps, and by steps as on a GPU."""
    from mcore_core.model.moe import experts

    experts.grouped_product = grouped_by_token
    many = prompts(5, (4, 11, 6, 3, 8, 5, 9, 7, 12, 2)) * 2
    given = settings(len(many))

    def run(engine):
        engine.submit(
            [Request(f"m{i}", p, s) for i, (p, s) in enumerate(zip(many, given, strict=True))]
        )
        mixed = drain(engine)
        warm = Sampling(max_tokens=TOKENS, temperature=0.9, seed=1)
        return {**mixed, **dict(enumerate(generate(engine, many, warm)))}

    engine = engine_of(folder, family, options={"native_slots": 9})
    plain = run(engine)
    recorder = Recorder()
    padded = run(as_on_a_gpu(engine, graphs=recorder))
    assert recorder.recorded >= 2, "settings of both kinds were recorded"
    return plain, padded


def check(tmp_path, name):
    case = CASES[name]
    write(tmp_path / "model", case)
    ((plain, padded),) = fork_ranks(lambda _: _both(tmp_path / "model", family_of(case)), 1)
    assert plain.keys() == padded.keys()
    for key, one in plain.items():
        assert padded[key].token_ids == one.token_ids
        assert padded[key].stop == one.stop
        assert np.abs(padded[key].logps - one.logps).max() < 1e-5


def test_dense(tmp_path):
    check(tmp_path, "qwen3")


@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILIES[1:])
def test_family(tmp_path, name):
    check(tmp_path, name)


def _ends(folder, family):
    """Return completions that end at a token or a string, in the middle of several steps."""
    found, engine = [], engine_of(folder, family, options={"native_slots": 4})
    for make in (lambda e: e, as_on_a_gpu):
        make(engine).update_weights(step=0)
        free = generate(engine, prompts(), Sampling(max_tokens=TOKENS, temperature=0))
        tokens = free[0].token_ids
        stop = Sampling(max_tokens=TOKENS, temperature=0, stop_token_ids=(tokens[5],))
        text = "".join(chr(64 + t) for t in tokens[6:8])
        words = Sampling(max_tokens=TOKENS, temperature=0, stop=("never", text))
        ends = generate(engine, prompts(), stop) + generate(engine, prompts(), words)
        engine.submit([Request(f"r{i}", p, stop) for i, p in enumerate(prompts())])
        renewed = {c.id: c for _ in range(4) for c in engine.poll(wait=False)}
        engine.update_weights(step=7)
        engine.sleep()
        renewed |= drain(engine)
        found.append(free + ends + [renewed[f"r{i}"] for i in range(len(prompts()))])
    return found


@pytest.mark.parity
def test_ends_in_the_middle_of_steps(tmp_path):
    write(tmp_path / "model", CASES["qwen3"])
    ((plain, padded),) = fork_ranks(
        lambda _: _ends(tmp_path / "model", family_of(CASES["qwen3"])), 1
    )
    assert {c.stop for c in plain} == {"stop", "length"}
    for a, b in zip(plain, padded, strict=True):
        assert (a.token_ids, a.stop) == (b.token_ids, b.stop)
        assert a.versions.tolist() == b.versions.tolist()
        assert np.abs(a.logps - b.logps).max() < 1e-5


LAYOUTS = {
    "tp2-sp": Layout(world=2, tp=2, sp=True),
    "pp2": Layout(world=2, pp=2),
    "ep2": Layout(world=2, ep=2),
}


@pytest.mark.parity
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(tmp_path, layout):
    case = CASES["qwen3_moe" if layout == "ep2" else "qwen3"]
    write(tmp_path / "model", case)
    sizes = {n: getattr(LAYOUTS[layout], n) for n in ("world", "tp", "pp", "ep", "sp")}
    warm = Sampling(max_tokens=TOKENS, temperature=0.8, top_k=20, repetition_penalty=1.2, seed=3)

    def run(_, padded, **sizes):
        engine = engine_of(tmp_path / "model", family_of(case), **sizes)
        return generate(as_on_a_gpu(engine) if padded else engine, prompts(), warm)

    expected = fork_ranks(lambda rank: run(rank, padded=False), 1)[0]
    for found in fork_ranks(lambda rank: run(rank, padded=True, **sizes), 2):
        for a, b in zip(found, expected, strict=True):
            assert a.token_ids == b.token_ids
            assert np.abs(a.logps - b.logps).max() < 1e-5
