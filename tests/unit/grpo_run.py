"""GRPO's recipe on one rank without a model: an engine and scores that are made up."""

import json
import zlib

import numpy as np
from mcore_rewards.config import RewardsConfig
from mcore_rlhf.config import ReferenceConfig, RLHFConfig
from mcore_rlhf.grpo.config import GRPOConfig
from mcore_rlhf.grpo.recipe import GRPORecipe
from mcore_rlhf.rollout.config import GenerationConfig, RolloutConfig
from mcore_rlhf.rollout.native.config import NativeConfig

from mcore_core.config.kernel import kernel_config
from mcore_core.protocols import Completion

GROUPS = (
    RLHFConfig,
    GRPOConfig,
    GenerationConfig,
    RolloutConfig,
    NativeConfig,
    ReferenceConfig,
    RewardsConfig,
)


class Engine:
    """Remembers what it was asked; answers depend on the id. `slow` ids need more polls."""

    def __init__(self, slow=lambda id: 0):
        self.log, self.waiting, self.version, self.slow = [], {}, None, slow
        self.requests = {}

    def submit(self, requests):
        self.log.append(("submit", [r.id for r in requests]))
        for r in requests:
            assert r.id not in self.requests, f"{r.id} is asked for twice"
            self.requests[r.id] = r
            self.waiting[r.id] = [r, self.slow(r.id), self.version]

    def poll(self, *, wait=True):
        done = []
        for key, entry in list(self.waiting.items()):
            if entry[1] > 0:
                entry[1] -= 1
                continue
            del self.waiting[key]
            done.append(self.complete(entry[0], entry[2]))
        return done[::-1]

    def complete(self, request, started):
        rng = np.random.default_rng(zlib.crc32(request.id.encode()))
        n = int(rng.integers(2, min(6, request.sampling.max_tokens) + 1))
        versions = np.full(n, self.version, np.int64)
        versions[0] = started
        return Completion(
            request.id,
            (*rng.integers(5, 50, n - 1).tolist(), 1),
            rng.normal(-1, 0.3, n).astype(np.float32),
            versions,
            "stop",
            np.ones(n, bool),
        )

    def wake(self):
        pass

    def sleep(self):
        assert not self.waiting

    def update_weights(self, *, step):
        self.log.append(("weights", step))
        self.version = step


class Run:
    """As much of protocols.StepRun as the recipe uses, for data-parallel size 1."""

    training, dp, micro_batches = True, (0, 1), 2

    def __init__(self, engine, draws=(), step=1):
        self.engine, self.step = engine, step
        self.draws, self.logs, self.shown, self.warnings = iter(draws), [], [], {}
        self.blended, self.scored = [], []

    def gather(self, value):
        return [value]

    def once(self, make):
        return make()

    def draw(self):
        return next(self.draws)

    def log(self, metrics):
        self.logs.append(dict(metrics))

    def show(self, rows):
        self.shown.append(list(rows))

    def warn(self, key, text):
        self.warnings[key] = text

    def blend(self, model, alpha):
        self.blended.append((self.step, model, alpha))

    def score(self, model, units):
        self.scored.append(model)
        shift = {"policy": 0.0, "ref": -0.5}[model]
        return [shift + np.append(u["rollout"][1:], 0).astype(np.float32) for u in units]

    def score_with_entropy(self, model, units):
        return [(s, np.arange(len(s), dtype=np.float32)) for s in self.score(model, units)]


class Words:
    eos_token_id, name_or_path, bos_token = 1, None, None

    def decode(self, ids, **_):
        return " ".join(map(str, ids))

    def __call__(self, text, **_):
        return {"input_ids": [60 + ord(c) % 30 for c in text]}


class Plain:
    tokenizer, system = Words(), None

    def render_prompt(self, conversation):
        said = "".join(f"[{m['role']}]{m['content']}" for m in conversation.messages)
        return said + "[assistant]"


def prompts(number, start=0):
    found = []
    for i in range(start, start + number):
        kept = {"row": {"prompt": str(i), "n": i}, "messages": [{"role": "user", "content": "q"}]}
        ids = np.array([70, 71 + i], np.int32)
        found.append({"input_ids": ids, "length": 2, "row": json.dumps(kept)})
    return found


def recipe(tmp_path, body="[len(r.token_ids) / 3 for r in rollouts]", **options):
    file = tmp_path / f"reward{zlib.crc32(body.encode())}.py"
    file.write_text(f"def reward(rollouts):\n    return {body}\n")
    base = {
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "num_generations": 4,
        "max_completion_length": 12,
        "reward_funcs": [f"{file}:reward"],
        "beta": 0.0,
    }
    return GRPORecipe(kernel_config(*GROUPS, **{**base, **options}), Plain())


def steps(made, units, run):
    """Take the steps of a round as the loop does; return what each trained on."""
    taken = []
    for split in made.prepare(units, run):
        taken.append([unit for micro in split.micros for unit in micro])
        run.step += 1
    return taken
