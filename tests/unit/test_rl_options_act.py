"""Every option of grpo, gkd, rollouts and rewards changes something, or is refused with a reason.

Tables in rl_options.py.
"""

import csv
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from grpo_run import GROUPS, Engine, Run, prompts, recipe, steps
from mcore_rewards.config import RewardsConfig
from mcore_rewards.cosine import Cosine
from mcore_rewards.form import Repetition, SoftOverlong
from mcore_rewards.plugin import RewardsPlugin
from mcore_rlhf.gkd.config import GKDConfig
from mcore_rlhf.gkd.plugin import GKDPlugin
from mcore_rlhf.gkd.recipe import GKDRecipe
from mcore_rlhf.grpo.config import GRPOConfig
from mcore_rlhf.grpo.plugin import GRPOPlugin
from mcore_rlhf.grpo.rewards import Rewards
from mcore_rlhf.rollout.config import GenerationConfig, RolloutConfig
from mcore_rlhf.rollout.native.config import NativeConfig
from mcore_rlhf.rollout.rules import BOTH, COLOCATE, NATIVE, SERVER
from rl_options import ADDRESSES, ELSEWHERE, GKD, GRPO, MORE, REFUSED, REWARDS, SERVED, STARTED

from mcore_core import compat
from mcore_core.config.kernel import kernel_config
from mcore_core.protocols import HeadOut, Rollout

compat.apply()  # before anything imports megatron

ROOT = Path(__file__).parents[2]


def test_every_option_is_in_a_table():
    groups = (GRPOConfig, GenerationConfig, RolloutConfig, NativeConfig, GKDConfig, RewardsConfig)
    wanted = {name for group in groups for name in group.model_fields}
    for name in ("arguments.tsv", "base_arguments.tsv"):
        with (ROOT / "tests/data" / name).open(encoding="utf-8") as file:
            rows = csv.DictReader(file, delimiter="\t")
            sections = ("GRPO", "GKD", "Generation", "Rewards")
            wanted |= {row["name"] for row in rows if row["group"] in sections}
    tables = (GRPO, STARTED, ADDRESSES, SERVED, GKD, REWARDS, ELSEWHERE, REFUSED)
    assert wanted - {name for table in tables for name in table} == set()


@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_tests_speak_of_it(name):
    assert name in (ROOT / ELSEWHERE[name]).read_text(encoding="utf-8")


# -- grpo ------------------------------------------------------------------------------------------


class Cut(Engine):
    """Some completions are cut by their length."""

    def complete(self, request, started):
        done = super().complete(request, started)
        return dataclasses.replace(done, stop="length") if done.token_ids[0] % 3 == 0 else done


class Drifted(Run):
    """The policy says something else than the engine did."""

    def score(self, model, units):
        found = super().score(model, units)
        return [s + np.float32(0.3) * np.sin(np.arange(len(s), dtype=np.float32)) for s in found]


def seen(tmp_path, *, body="[len(r.token_ids) / 3 for r in rollouts]", **options):
    """What two rounds ask, train, report and do to the reference; no wall-clock times."""
    (tmp_path / "more.py").write_text(MORE)
    options = {k: filled(v, tmp_path) for k, v in options.items()}
    made = recipe(tmp_path, body, **options)
    talks = options.get("multi_turn_scheduler") is not None
    engine = Engine() if talks else Cut(slow=lambda key: len(key) + int(key[1]) % 3)
    run = Drifted(engine, draws=(prompts(made.rounds.prompts, i) for i in range(20, 90)))
    trained = [
        losses(made, units)
        for i in range(2)
        for units in steps(made, prompts(made.rounds.prompts, 2 * i), run)
    ]
    asked = [(r.id, r.token_ids, dataclasses.astuple(r.sampling)) for r in engine.requests.values()]
    logs = [{k: v for k, v in log.items() if not k.startswith("timers/")} for log in run.logs]
    sizes = (made.rounds, made.engine, dataclasses.astuple(made.head))
    return repr((trained, asked, engine.log, logs, run.shown, run.blended, run.warnings, sizes))


def filled(value, tmp_path):
    if isinstance(value, list):
        return [filled(v, tmp_path) for v in value]
    return value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value


def losses(made, units):
    """The loss, its gradient and what it counts, for log-probabilities near the engine's."""
    from mcore_core.parallel.reduce import RowReduce

    batch = made.collate(units)
    rng = np.random.default_rng(len(batch.tokens_T))
    near = batch.rollout_T.numpy() + rng.normal(0, 0.5, len(batch.rollout_T))
    logps_T = torch.tensor(near, dtype=torch.float32, requires_grad=True)
    seq_T = torch.repeat_interleave(torch.arange(len(units)), torch.tensor(batch.lengths))
    reduce = RowReduce(seq_T, torch.ones(len(units), dtype=torch.bool))
    out = made.loss(HeadOut(logps_T=logps_T), batch, reduce)
    out.total.backward()
    return out.total.item(), float(out.count), logps_T.grad.tolist()


@pytest.mark.parametrize("name", GRPO)
def test_grpo(tmp_path, name):
    value, beside = GRPO[name]
    without = seen(tmp_path, **beside)
    assert without == seen(tmp_path, **beside), "it is not the same twice"
    assert without != seen(tmp_path, **{**beside, name: value})


# -- rollouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STARTED)
def test_what_vllm_is_started_with(name):
    from mcore_rlhf.rollout.vllm import colocate

    def given(**options):
        context = SimpleNamespace(
            config=kernel_config(*GROUPS, tuner_type="lora", use_vllm=True, **options),
            model_path=Path("model"),
            plan=SimpleNamespace(dtype=torch.bfloat16),
        )
        return colocate.arguments(context)

    without, found = given(), given(**{name: STARTED[name]})
    changed = {k for k in found if found[k] != without.get(k)}
    direct = name.removeprefix("vllm_")
    wanted = {"sleep_level": "enable_sleep_mode"}.get(name, direct)
    assert wanted in changed
    if wanted == direct:
        assert found[wanted] == STARTED[name]
    if name != "vllm_enable_lora":
        assert changed == {wanted}


@pytest.mark.parametrize("name", ADDRESSES)
def test_servers(name):
    value, wanted = ADDRESSES[name]
    assert RolloutConfig(**{name: value}).servers == tuple(wanted)
    assert RolloutConfig(**{name: value}).mode == ("colocate" if "port" in name else "server")


@pytest.mark.parametrize("name", SERVED)
def test_what_servers_are_asked_with(name, monkeypatch):
    from mcore_rlhf.rollout.vllm import servers

    told = {}
    state = SimpleNamespace(dtype="float32")
    monkeypatch.setattr(servers, "parallel_state", FakeRanks)
    monkeypatch.setattr(servers.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(servers, "from_first", lambda make: make())
    monkeypatch.setattr(servers, "connect", lambda urls, timeout: told.update(c=timeout) or [state])
    monkeypatch.setattr(servers, "Fleet", lambda urls, **given: told.update(given))
    monkeypatch.setattr(servers.VllmServers, "_check", lambda self: None)
    options = {"use_vllm": True, "vllm_mode": "server", name: SERVED[name]}
    servers.VllmServers(SimpleNamespace(config=kernel_config(*GROUPS, **options)))
    if name == "vllm_server_timeout":
        assert (told["c"], told["timeout"]) == (3.5, 3.5)
    assert told["with_rows"] == (name == "vllm_server_pass_dataset")


class FakeRanks:
    """A model on one rank."""

    @staticmethod
    def get_model_parallel_group():
        return SimpleNamespace(rank=lambda: 0)

    @staticmethod
    def get_context_parallel_rank():
        return 0


VALUES = {
    **{name: value for name, value in STARTED.items()},
    **{name: value for name, (value, _) in ADDRESSES.items()},
    **SERVED,
    "vllm_mode": "server",
    "offload_optimizer": True,
    "offload_model": True,
    "native_slots": 3,
    "native_kv_gib": 1.5,
    "native_cuda_graphs": False,
}


def problems(plugin, **options):
    config = kernel_config(
        *dict.fromkeys((*plugin.mcore_config_groups(), RewardsConfig)), **options
    )
    return [p.message for p in plugin.mcore_validate_config(config=config)]


@pytest.mark.parametrize("plugin", [GRPOPlugin, GKDPlugin])
def test_options_of_another_engine_are_refused(plugin):
    for name in (*SERVER, *COLOCATE, *BOTH):
        found = problems(plugin(), **{name: VALUES[name]})
        assert any(f"--{name} does nothing with --rollout_engine native" in m for m in found), name
    for name in NativeConfig.model_fields:
        found = problems(plugin(), use_vllm=True, **{name: VALUES[name]})
        assert any(f"--{name} does nothing with --rollout_engine vllm" in m for m in found), name
    assert set(NATIVE) == set(NativeConfig.model_fields)
    for mode, names in (("server", COLOCATE), ("colocate", SERVER)):
        for name in names:
            given = {"use_vllm": True, "vllm_mode": mode, name: VALUES[name]}
            found = problems(plugin(), **given)
            assert any(f"--{name} does nothing with --vllm_mode {mode}" in m for m in found), name


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    value, why = REFUSED[name]
    assert any(f"--{name}" in m and why in m for m in problems(GRPOPlugin(), **{name: value}))


IDLE = {
    "max_resample_times": 5,
    "ref_model_sync_steps": 5,
    "ref_model_mixup_alpha": 0.5,
    "rollout_importance_sampling_threshold": 3.0,
    "max_staleness": 2,
    "partial_rollouts": True,
    "max_turns": 3,
    "cispo_max_ratio": 3.0,
    "tau_pos": 2.0,
    "tau_neg": 2.0,
}


@pytest.mark.parametrize("name", IDLE)
def test_without_what_it_belongs_to_it_is_refused(name):
    assert any(
        f"--{name} " in m and "does nothing" in m
        for m in problems(GRPOPlugin(), **{name: IDLE[name]})
    )


# -- gkd -------------------------------------------------------------------------------------------


def distilled(**options):
    config = kernel_config(*GKDPlugin().mcore_config_groups(), **{"teacher_model": "t", **options})
    made = GKDRecipe(config, None)
    whose = [made.source(SimpleNamespace(step=i, training=True)) for i in range(50)]
    unit = {
        "input_ids": np.arange(4, dtype=np.int32),
        "weights": np.ones(4, np.float32),
        "length": 4,
    }
    return repr((made.frozen, made.head, whose, made.collate([unit]).nll_T))


@pytest.mark.parametrize("name", GKD)
def test_gkd(name):
    assert distilled() == distilled()
    assert distilled() != distilled(**{name: GKD[name]})


GENERATED = ("max_completion_length", "top_k", "top_p", "repetition_penalty", "stop_words")


def test_gkd_generates_with_the_same_options():
    from grpo_run import Plain
    from mcore_rlhf.rollout.generate import sampling_of

    groups = GKDPlugin().mcore_config_groups()
    without = sampling_of(kernel_config(*groups), Plain())
    for name in GENERATED:
        given = kernel_config(*groups, **{name: GRPO[name][0]})
        assert sampling_of(given, Plain()) != without, name
        assert any(
            f"--{name}" in m for m in problems(GKDPlugin(), lmbda=0.0, **{name: GRPO[name][0]})
        )


# -- rewards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWARDS)
def test_rewards(name):
    def scored(**options):
        made = kernel_config(
            *GROUPS, **{"soft_cache_length": 2, "max_completion_length": 12, **options}
        )
        said = [
            Rollout(
                row={"solution": "1"},
                text=rf"\boxed{{{answer}}}",
                token_ids=(1, 2) * 4,
                finished=True,
            )
            for answer in (1, 2)
        ]
        return [kind(made)(said) for kind in (Cosine, Repetition, SoftOverlong)]

    assert scored() != scored(**{name: REWARDS[name][0]})


@pytest.mark.parametrize("name", REWARDS)
def test_constants_of_rewards_that_are_not_used_are_refused(name):
    config = kernel_config(*GROUPS, reward_funcs=["format"], **{name: REWARDS[name][0]})
    found = [p.message for p in RewardsPlugin().mcore_validate_config(config=config)]
    assert any(f"--{name} does nothing" in m for m in found)


def test_the_time_of_rewards_reaches_them():
    config = kernel_config(*GROUPS, reward_funcs=["format"], reward_timeout=0.25)
    assert Rewards.of(config, device=lambda: "cpu").timeout == 0.25
