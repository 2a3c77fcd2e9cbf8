"""The native engine on tiny models of several families, and transformers' answers."""

from dataclasses import dataclass

import numpy as np
import torch
from family_runs import build, plan_of

from mcore_core.config.kernel import kernel_config
from mcore_core.protocols import EngineContext, Request

PROMPTS = (5, 9, 2, 14, 9, 7)
"""Lengths of the prompts; the third has the shortest, two are alike in length."""


def prompts(seed=0, lengths=PROMPTS):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(3, 100, n).tolist()) for n in lengths]


@dataclass(frozen=True)
class Characters:
    """A tokenizer of one letter a token: enough for stop strings."""

    eos_token_id: int | None = None

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(64 + i) for i in ids)


def engine_of(folder, family, *, tokenizer=None, options=None, **sizes):
    """Return an engine on this rank, with the weights of the folder; joins megatron's groups."""
    from mcore_rlhf.rollout.native.config import NativeConfig
    from mcore_rlhf.rollout.native.engine import NativeEngine

    bridge, chunks = build(folder, family, **sizes)
    bridge.load(chunks, folder)
    plan = plan_of(folder, family, **sizes)
    context = EngineContext(
        config=kernel_config(NativeConfig, model=str(folder), **(options or {})),
        chunks=chunks,
        plan=plan,
        device=torch.device("cpu"),
        tokenizer=tokenizer or Characters(),
        bridge=bridge,
        model_path=folder,
    )
    engine = NativeEngine(context)
    engine.update_weights(step=0)
    return engine


def as_on_a_gpu(engine, *, steps=5, graphs=None):
    """Have steps padded, and several between two looks of the host, as on a GPU."""
    from mcore_rlhf.rollout.native.steps import Steps

    engine.sleep()
    engine.few_sizes, engine.most_steps = True, steps
    engine._steps = Steps(engine.forward, engine.device, graphs, most=steps)
    return engine


def requests_of(token_ids, sampling, prefix="r"):
    return [Request(f"{prefix}{i}", ids, sampling) for i, ids in enumerate(token_ids)]


def drain(engine):
    """Return all completions by id."""
    found = {}
    while done := engine.poll():
        found |= {c.id: c for c in done}
    return found


def generate(engine, token_ids, sampling, prefix="r"):
    engine.submit(requests_of(token_ids, sampling, prefix))
    found = drain(engine)
    assert len(found) == len(token_ids)
    return [found[f"{prefix}{i}"] for i in range(len(token_ids))]


def greedy_of(model, token_ids, tokens):
    """Return transformers' greedy continuation of each prompt by itself, with its scores."""
    found = []
    for ids in token_ids:
        out = model.generate(
            torch.tensor([ids]),
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = out.sequences[0, len(ids) :]
        logps = torch.stack(out.logits, 1)[0].float().log_softmax(-1)
        found.append((tuple(new.tolist()), logps.gather(-1, new[:, None]).squeeze(-1).numpy()))
    return found
