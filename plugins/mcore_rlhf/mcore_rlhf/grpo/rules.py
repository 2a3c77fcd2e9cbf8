"""Contradictions between the options of GRPO, seen without torch."""

import json
from collections.abc import Iterator
from pathlib import Path

from mcore_core.config.compose import RunConfig
from mcore_core.config.decode import as_typed
from mcore_core.errors import Problem
from mcore_rlhf import components
from mcore_rlhf.grpo.config import GRPOConfig
from mcore_rlhf.rollout.config import RolloutConfig
from mcore_rlhf.rollout.rules import check_rollout
from mcore_rlhf.rules import check_method, check_reference

OURS = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo")


def check(config: RunConfig) -> Iterator[Problem]:
    """Yield every problem."""
    options = config[GRPOConfig]
    yield from check_method(config, "grpo")
    yield from check_reference(config, used=options.beta > 0, why="--beta 0")
    yield from check_rollout(config)
    yield from _batches(config, options)
    yield from _rewards(options)
    yield from _loss(config, options)
    yield from _advantages(options)
    yield from _replay(config, options)
    yield from _idle(config)


def _batches(config: RunConfig, options: GRPOConfig) -> Iterator[Problem]:
    global_batch = config.get("global_batch_size")
    size, group = options.generation_batch_size, options.num_generations
    steps = options.steps_per_generation
    if group < 2:
        yield Problem(
            "MC350",
            "--num_generations 1: a completion that is compared with nothing has no advantage",
            ["fix: --num_generations 8"],
        )
    if size is not None and size % global_batch:
        near = [n for n in (size // global_batch * global_batch,) if n] + [
            (size // global_batch + 1) * global_batch
        ]
        yield Problem(
            "MC351",
            f"--generation_batch_size {size} is not a multiple of --global_batch_size "
            f"{global_batch}: its completions make whole optimizer steps",
            [
                f"{size} / {global_batch} = {size / global_batch:.2f}",
                "fix: --generation_batch_size " + " or ".join(map(str, near)),
            ],
        )
        return
    if size is not None and steps is not None and size != steps * global_batch:
        yield Problem(
            "MC351",
            f"--generation_batch_size {size} and --steps_per_generation {steps} disagree",
            [
                f"{steps} steps x --global_batch_size {global_batch} = {steps * global_batch}",
                f"fix: leave one out, or --steps_per_generation {size // global_batch}",
            ],
        )
    generated = options.generated(global_batch)
    if generated % group:
        below, above = generated // group * group, (generated // group + 1) * group
        divisors = [n for n in range(2, generated + 1) if generated % n == 0]
        closest = sorted(divisors, key=lambda n: abs(n - group))[:2]
        yield Problem(
            "MC352",
            f"{generated} completions of a round are not a multiple of --num_generations {group}",
            [
                f"global_batch_size {global_batch} x {generated // global_batch} steps of a round "
                f"/ {group} = {generated / group:.2f} prompts",
                "fix: --num_generations "
                + " or ".join(map(str, sorted(closest)))
                + ", or rounds of "
                + " or ".join(str(n) for n in (below, above) if n)
                + " completions",
            ],
        )


def _reward_model(folder: Path) -> Iterator[Problem]:
    """Look into a folder; a hub model is looked at when it has been fetched.

    transformers would put a random head on a model that has none.
    """
    if not folder.is_dir():
        return
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    architectures = config.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        entries = ", ".join(sorted(p.name for p in folder.iterdir())[:8])
        found = ", ".join(architectures) or f"no config.json that names one, but {entries}"
        yield Problem(
            "MC344",
            f"--reward_model {folder} is no sequence-classification model",
            [
                f"found: {found}",
                "fix: a checkpoint-N of a run of rm; with LoRA its checkpoint-N-merged",
            ],
        )
    elif (labels := len(config.get("id2label") or (0, 1))) != 1:  # transformers' default is two
        yield Problem(
            "MC344",
            f"--reward_model {folder} has {labels} labels; a reward is one number",
            ["fix: name a model that was trained with num_labels 1"],
        )


def _rewards(options: GRPOConfig) -> Iterator[Problem]:
    names = [*options.reward_funcs, *options.reward_model]
    if not names:
        yield Problem(
            "MC353",
            "there is no reward",
            ["fix: --reward_funcs accuracy, or ./FILE.py:FUNCTION; see docs/rewards.md"],
        )
    for name in options.reward_funcs:
        yield from components.check("mcore_rewards", name, "--reward_funcs")
    for source in options.reward_model:
        yield from _reward_model(Path(source).expanduser())
    weights = options.reward_weights
    if weights is not None and len(weights) != len(names):
        yield Problem(
            "MC354",
            f"--reward_weights has {len(weights)} numbers for {len(names)} rewards",
            [f"rewards: {', '.join(names) or 'none'}", "fix: one number for each, in this order"],
        )


def _loss(config: RunConfig, options: GRPOConfig) -> Iterator[Problem]:
    name = options.loss_type
    if name not in OURS:
        yield from components.check("mcore_losses", name, "--loss_type")
    owners = {
        "epsilon": CLIPPED,
        "epsilon_high": CLIPPED,
        "delta": CLIPPED,
        "cispo_max_ratio": ("cispo",),
        "tau_pos": ("sapo",),
        "tau_neg": ("sapo",),
    }
    for option, users in owners.items():
        if name in OURS and name not in users and config.changed(option):
            notes = [f"it is for {', '.join(users)}"]
            if name == "cispo" and option == "epsilon_high":
                high = float(config.get(option))
                notes.append(f"fix: --cispo_max_ratio {high:g} bounds cispo's ratio")
            yield Problem(
                "MC355",
                f"--{option} {as_typed(config.get(option))} does nothing with --loss_type {name}",
                notes if len(notes) > 1 else [*notes, f"fix: leave out --{option}"],
            )
    high = options.epsilon if options.epsilon_high is None else options.epsilon_high
    if options.delta is not None and options.delta <= 1 + high:
        yield Problem(
            "MC356",
            f"--delta {options.delta:g} is not above 1 + epsilon_high = {1 + high:g}: it would cut "
            "ratios that are not clipped",
            [f"fix: --delta {2 * (1 + high):g}"],
        )


def _advantages(options: GRPOConfig) -> Iterator[Problem]:
    if options.scale == "gdpo":
        if options.kl_in_reward:
            yield Problem(
                "MC357",
                "--kl_in_reward true cannot be used with --scale_rewards gdpo, which normalizes "
                "each reward by itself",
                ["fix: leave out --kl_in_reward; the KL is then added to the loss"],
            )
        if options.advantage_estimator != "grpo":
            yield Problem(
                "MC357",
                f"--scale_rewards gdpo has a baseline of its own: --advantage_estimator "
                f"{options.advantage_estimator} would do nothing",
                ["fix: keep one of them"],
            )
    if options.kl_in_reward and options.beta == 0:
        yield Problem(
            "MC321",
            "--kl_in_reward true does nothing with --beta 0",
            ["fix: --beta 0.04, or leave it out"],
        )


def _replay(config: RunConfig, options: GRPOConfig) -> Iterator[Problem]:
    mode, engine = options.router_replay_mode, config[RolloutConfig].engine
    if mode == "R3" and engine == "vllm":
        yield Problem(
            "MC362",
            "--router_replay_mode R3: the rollout engine does not say which experts tokens went to",
            ["fix: --rollout_engine native, or --router_replay_mode R2"],
        )
    if mode == "R2" and options.steps_per_round(config.get("global_batch_size")) == 1:
        yield Problem(
            "MC321",
            "--router_replay_mode R2 does nothing with one optimizer step a round: the pass that "
            "trains is the one that routes",
            ["fix: --num_iterations 2 or --steps_per_generation 2, or --router_replay_mode R3"],
        )


def _idle(config: RunConfig) -> Iterator[Problem]:
    """Options that act only beside another."""
    needs = {
        "max_resample_times": ("dynamic_sample", bool(config.get("dynamic_sample"))),
        "ref_model_sync_steps": ("sync_ref_model", bool(config.get("sync_ref_model"))),
        "ref_model_mixup_alpha": ("sync_ref_model", bool(config.get("sync_ref_model"))),
        "sync_ref_model": ("beta", config.get("beta") > 0),
        "rollout_importance_sampling_threshold": (
            "rollout_importance_sampling_mode",
            config.get("rollout_importance_sampling_mode") is not None
            or bool(config.get("log_rollout_offpolicy_metrics"))
            or bool(config.get("async_generate")),
        ),
    }
    for name, (other, on) in needs.items():
        if config.changed(name) and not on:
            yield Problem(
                "MC321",
                f"--{name} does nothing without --{other}",
                [f"fix: add --{other}, or leave out --{name}"],
            )
    if config.get("sync_ref_model") and config.get("tuner_type") == "lora":
        yield Problem(
            "MC358",
            "--sync_ref_model true moves the reference's weights towards the policy's, and with "
            "LoRA those stay as they are: the adapters are what trains",
            ["fix: leave it out, or --tuner_type full"],
        )
    given = [name for name in ("ref_adapters", "ref_adapter_load") if config.get(name)]
    if config.get("sync_ref_model") and given:
        yield Problem(
            "MC358",
            f"--sync_ref_model true moves the reference's weights, and what --{given[0]} adds to "
            "them would stay",
            ["fix: merge it with mcore export --merge_lora true, as --ref_model"],
        )
