"""vLLM in the training processes, with a vLLM that is made up; and memory that is lent to it."""

import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mcore_rlhf.rollout.config import RolloutConfig
from mcore_rlhf.rollout.vllm import aside, colocate

from mcore_core.errors import UsageError
from mcore_core.protocols import Request, Sampling


class LLM:
    """Remembers what it was asked; a token is the prompt's length and what came before."""

    def __init__(self, **given):
        self.given, self.log, self.weights = given, [], {}
        self.missing = []
        self.llm_engine = SimpleNamespace(add_lora=self.add_lora, remove_lora=self.remove_lora)
        LLM.made = self

    def collective_rpc(self, method, args=()):
        if method == "mcore_prepare":
            return [{"logps": "tempered", "dtype": "float32", "version": -1}]
        tensors, version = args
        self.weights = dict(tensors)
        self.log.append(("load", version))
        return [{"version": version, "tensors": len(self.weights), "missing": self.missing}]

    def generate(self, prompts, params, *, use_tqdm, lora_request):
        self.log.append(("generate", len(prompts)))
        outputs = []
        for prompt, one in zip(prompts, params, strict=True):
            tokens = [len(prompt["prompt_token_ids"]) + i for i in range(one.max_tokens)]
            logprobs = [{t: SimpleNamespace(logprob=-float(t))} for t in tokens]
            done = SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason="length")
            outputs.append(SimpleNamespace(outputs=[done]))
        return outputs

    def sleep(self, level):
        self.log.append(("sleep", level))

    def wake_up(self, tags):
        self.log.append(("wake", *tags))

    def reset_prefix_cache(self):
        self.log.append(("reset",))

    def add_lora(self, adapter):
        self.log.append(("adapter", adapter.lora_int_id))
        return True

    def remove_lora(self, number):
        self.log.append(("no adapter", number))


class One:
    def size(self):
        return 1

    def rank(self):
        return 0


@pytest.fixture
def build(monkeypatch):
    vllm, lora = types.ModuleType("vllm"), types.ModuleType("vllm.lora")
    request = types.ModuleType("vllm.lora.request")
    vllm.LLM, vllm.SamplingParams = LLM, lambda **given: SimpleNamespace(**given)
    request.LoRARequest = lambda name, number, path: SimpleNamespace(
        lora_name=name, lora_int_id=number, lora_path=path
    )
    found = {"vllm": vllm, "vllm.lora": lora, "vllm.lora.request": request}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(colocate, "start", lambda context: LLM())
    monkeypatch.setattr(colocate, "gather_weights", lambda chunks: None)
    monkeypatch.setattr(colocate, "rng_state", dict)
    monkeypatch.setattr(colocate, "set_rng_state", lambda state: None)
    monkeypatch.setattr(colocate, "adapter", lambda context: (b"weights", b"{}"))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    for name in ("get_model_parallel_group", "get_context_parallel_group"):
        monkeypatch.setattr(colocate.parallel_state, name, One)

    def make(**options):
        chunk = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(4))])
        optimizer.param_groups[0]["params"][0].grad = torch.ones(4)
        optimizer.step()
        context = SimpleNamespace(
            config={RolloutConfig: RolloutConfig(**options)},
            chunks=[chunk],
            device=torch.device("cpu"),
            optimizer=SimpleNamespace(optimizer=optimizer),
            bridge=SimpleNamespace(export=lambda chunks: iter(chunk.state_dict().items())),
            tuner=None,
        )
        return colocate.VllmColocated(context), context

    return make


def requests(*lengths, tokens=3):
    sampling = Sampling(max_tokens=tokens, stop_token_ids=(2,))
    return [Request(f"r{n}", tuple(range(n)), sampling) for n in lengths]


def a_round(engine, step, number=2):
    engine.wake()
    engine.update_weights(step=step)
    engine.submit(requests(*range(4, 4 + number)))
    done = engine.poll()
    engine.sleep()
    return done


def test_it_generates_with_the_weights_of_the_step(build):
    engine, context = build()
    first, second = a_round(engine, 7)
    assert first.id == "r4" and first.token_ids == (4, 5, 6)
    assert second.versions.tolist() == [7] * 3
    np.testing.assert_array_equal(first.logps, np.float32([-4, -5, -6]))
    assert torch.equal(LLM.made.weights["weight"], context.chunks[0].weight)
    assert [entry for entry in LLM.made.log if entry[0] in ("sleep", "wake")] == []


@pytest.mark.parametrize("level", [1, 2])
def test_it_sleeps_while_the_policy_trains(build, level):
    engine, _ = build(sleep_level=level)
    assert LLM.made.log == [("sleep", level)], "it holds nothing before the first round"
    a_round(engine, 0)
    assert LLM.made.log[1:] == [
        ("wake", "weights"), ("load", 0), ("reset",), ("wake", "kv_cache"), ("generate", 2),
        ("sleep", level),
    ]  # fmt: skip
    del LLM.made.log[:]
    engine.wake()  # an evaluation with the same weights
    engine.submit(requests(4))
    engine.poll()
    lost = [("load", 0), ("reset",)] if level == 2 else []
    assert LLM.made.log == [("wake", "weights"), *lost, ("wake", "kv_cache"), ("generate", 1)]


def test_memory_is_lent_and_comes_back_as_it_was(build):
    engine, context = build(offload_optimizer=True, offload_model=True, sleep_level=1)
    weight = context.chunks[0].weight
    before = weight.detach().clone()
    state = next(iter(context.optimizer.optimizer.state.values()))["exp_avg"]
    kept = state.clone()
    seen = []
    generate = LLM.made.generate

    def spying(*args, **kwargs):
        seen.append((weight.untyped_storage().nbytes(), state.untyped_storage().nbytes()))
        return generate(*args, **kwargs)

    LLM.made.generate = spying
    for step in range(2):
        a_round(engine, step)
        assert torch.equal(weight, before) and torch.equal(state, kept)
    assert seen == [(0, 0), (0, 0)]


def test_what_is_cancelled_is_not_generated(build):
    engine, _ = build()
    engine.update_weights(step=0)
    engine.submit([*requests(4, 5), *requests(6, tokens=0)])
    engine.cancel(["r5", "unknown"])
    stops = {done.id: done.stop for done in engine.poll()}
    assert stops == {"r4": "length", "r5": "cancelled", "r6": "length"}
    assert ("generate", 1) in LLM.made.log


def test_adapters_replace_each_other(build):
    engine, _ = build(vllm_enable_lora=True)
    a_round(engine, 0)
    a_round(engine, 1)
    kinds = ("adapter", "no adapter")
    entries = [entry for entry in LLM.made.log if entry[0] in kinds]
    assert entries == [("adapter", 1), ("adapter", 2), ("no adapter", 1)]
    assert all(entry[0] != "load" for entry in LLM.made.log)
    engine.close()


def test_ranks_that_do_not_divide(build):
    with pytest.raises(UsageError, match="does not divide the 1 ranks"):
        build(vllm_tensor_parallel_size=2)


def test_views_of_one_storage_stay_views():
    flat = torch.arange(6.0)
    views = [flat[:2], flat[2:].view(2, 2)]
    away = aside.Aside(views, torch.device("cpu"), keep=True)
    zero = aside.Aside([torch.ones(0), torch.ones(3)], torch.device("cpu"), keep=False)
    for part in (away, zero):
        part.leave()
        part.leave()
    assert flat.untyped_storage().nbytes() == 0
    away.come_back()
    away.come_back()
    assert views[1].tolist() == [[2.0, 3.0], [4.0, 5.0]]
    flat[0] = 9
    assert views[0][0] == 9


def test_gradients_come_back_as_zero():
    gradient = torch.ones(3)
    part = aside.Aside([gradient], torch.device("cpu"), keep=False)
    part.leave()
    part.come_back()
    assert gradient.tolist() == [0.0, 0.0, 0.0]
