"""Random completions, and TRL's own loss code on them."""

from types import SimpleNamespace

import numpy as np
import torch
from mcore_rlhf.grpo.batch import collate
from trl.trainer.grpo_trainer import GRPOTrainer

from mcore_core.parallel.reduce import RowReduce
from mcore_core.protocols import HeadOut


class Completions:
    """S completions with everything a loss may need; arrays cover the completion only."""

    def __init__(self, seed: int, sizes: tuple[int, ...] = (5, 1, 7, 3), spread: float = 0.4):
        rng = np.random.default_rng(seed)
        self.sizes = sizes
        self.prompts = [int(rng.integers(1, 4)) for _ in sizes]
        self.new = [rng.normal(-1.5, 0.7, n) for n in sizes]
        self.old = [x + rng.normal(0, spread, len(x)) for x in self.new]
        self.ref = [x + rng.normal(0, spread, len(x)) for x in self.new]
        self.rollout = [x + rng.normal(0, 0.3, len(x)) for x in self.old]
        self.policy = [rng.uniform(0, 2, n) for n in sizes]
        self.trains = [rng.random(n) < 0.8 for n in sizes]
        for t in self.trains:
            t[rng.integers(len(t))] = True
        self.advantages = rng.normal(0, 1, len(sizes))
        self.advantages[rng.integers(len(sizes))] = 0.0
        self.kept = [True] * len(sizes)

    def units(self, *, old=True, ref=True, policy=False):
        """The units that the recipe would collate."""
        found = []
        for i, n in enumerate(self.sizes):
            p = self.prompts[i]

            def whole(values, fill=0.0, p=p):
                return np.concatenate([np.full(p, fill), values]).astype(np.float64)

            found.append(
                {
                    "input_ids": np.arange(p + n),
                    "trains": np.concatenate([np.zeros(p, bool), self.trains[i]]),
                    "advantage": self.advantages[i],
                    "kept": self.kept[i],
                    "rollout": whole(self.rollout[i]),
                    "length": p + n,
                    **({"old": whole(self.old[i])} if old else {}),
                    **({"ref": whole(self.ref[i])} if ref else {}),
                    **({"policy": whole(self.policy[i], 1.0)} if policy else {}),
                }
            )
        return found

    def ours(self, function, *, divisor, length=16, micros=1, **fields):
        """Sum of totals over sum of counts, gradients of each new log-probability, metrics."""
        units = self.units(**fields)
        size = -(-len(units) // micros)
        leaves, total, count, metrics = [], 0.0, 0.0, {}
        for at in range(0, len(units), size):
            part = units[at : at + size]
            batch = double(collate(part, divisor=divisor, length=length))
            leaf = [torch.tensor(x, requires_grad=True) for x in self.new[at : at + size]]
            leaves += leaf
            rows = [
                torch.cat((torch.zeros(self.prompts[at + i] - 1).double(), x, torch.zeros(1)))
                for i, x in enumerate(leaf)
            ]
            seq = torch.repeat_interleave(
                torch.arange(len(part)), torch.tensor([u["length"] for u in part])
            )
            reduce = RowReduce(seq, torch.ones(len(part), dtype=torch.bool))
            out = function(HeadOut(logps_T=torch.cat(rows)), batch, reduce)
            total, count = total + out.total, count + out.count
            for name, (a, b) in out.metrics.items():
                x, y = metrics.get(name, (0.0, 0.0))
                metrics[name] = (x + float(a), y + float(b))
        loss = total / count
        loss.backward()
        return loss.item(), [x.grad.numpy() for x in leaves], metrics

    def trl(self, *, micros=1, rounds=1, old=True, policy=False, **args):
        """The same from TRL's `_compute_loss`, with gradient accumulation over micro-batches.

        `rounds`: optimizer steps that share a generation, each with as many tokens as this one.
        """
        size = -(-len(self.sizes) // micros)
        leaves = [torch.tensor(x, requires_grad=True) for x in self.new]
        items = (
            sum(int((t & k).sum()) for t, k in zip(self.trains, self.kept, strict=True)) * rounds
        )
        logged = {}
        loss = 0.0
        for at in range(0, len(self.sizes), size):
            part = range(at, min(at + size, len(self.sizes)))
            trainer = fake_trainer(leaves, part, micros, micros * rounds, policy, args)
            mask = padded([self.trains[i] & self.kept[i] for i in part]).double()
            inputs = {
                "prompt_ids": torch.zeros(len(part), 1),
                "prompt_mask": torch.ones(len(part), 1),
                "completion_ids": torch.zeros_like(mask),
                "completion_mask": mask,
                "advantages": torch.tensor(self.advantages[list(part)]),
                "num_items_in_batch": torch.tensor(float(items)),
                "ref_per_token_logps": padded([self.ref[i] for i in part]),
                "sampling_per_token_logps": padded([self.rollout[i] for i in part]),
                **({"old_per_token_logps": padded([self.old[i] for i in part])} if old else {}),
                "importance_sampling_ratio": padded([self.policy[i] for i in part]),
            }
            loss = loss + GRPOTrainer._compute_loss(trainer, None, inputs)
            for name, values in trainer._metrics["train"].items():
                logged.setdefault(name, []).extend(values)
        loss.backward()
        return loss.item(), [x.grad.numpy() for x in leaves], logged


def fake_trainer(leaves, part, micros, steps_per_generation, policy, args):
    """What `_compute_loss` reads of a trainer."""
    from collections import defaultdict

    logps = padded([leaves[i] for i in part])
    options = {
        "delta": None,
        "use_bias_correction_kl": False,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "steps_per_generation": steps_per_generation,
    }
    fields = {
        "beta": 0.0,
        "loss_type": "grpo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "importance_sampling_level": "token",
        "off_policy_mask_threshold": None,
        "max_completion_length": 16,
    }
    for name, value in args.items():
        (fields if name in fields else options)[name] = value
    same = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True
    )
    return SimpleNamespace(
        **fields,
        args=SimpleNamespace(**options),
        accelerator=same,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        use_vllm=policy,
        vllm_importance_sampling_correction=policy,
        current_gradient_accumulation_steps=micros,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
    )


def padded(rows):
    """Rows of unequal length as one tensor, zeros at the right."""
    rows = [x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def double(batch):
    """The batch in float64, so that a difference is not rounding."""
    import dataclasses

    changed = {
        f.name: v.double()
        for f in dataclasses.fields(batch)
        if isinstance(v := getattr(batch, f.name), torch.Tensor) and v.is_floating_point()
    }
    return dataclasses.replace(batch, **changed)
