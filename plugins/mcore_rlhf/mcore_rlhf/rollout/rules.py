"""Contradictions between the options of generation, seen without torch."""

from collections.abc import Iterator

from mcore_core.config.compose import RunConfig
from mcore_core.errors import Problem
from mcore_rlhf import components
from mcore_rlhf.rollout.config import RolloutConfig

SERVER = (
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_base_url",
    "vllm_server_timeout",
    "vllm_server_pass_dataset",
)
COLOCATE = (
    "vllm_gpu_memory_utilization",
    "vllm_max_model_len",
    "vllm_enforce_eager",
    "vllm_enable_prefix_caching",
    "vllm_tensor_parallel_size",
    "sleep_level",
    "offload_optimizer",
    "offload_model",
)
BOTH = ("vllm_mode", "vllm_enable_lora")
NATIVE = ("native_slots", "native_kv_gib", "native_cuda_graphs")


def check_rollout(config: RunConfig) -> Iterator[Problem]:
    """Yield every problem."""
    options = config[RolloutConfig]
    engine, mode = options.engine, options.mode
    if engine != "native":
        yield from components.check("mcore_rollout_engines", engine, "--rollout_engine")
    if options.use_vllm and options.rollout_engine not in (None, "vllm"):
        yield Problem(
            "MC320",
            f"--use_vllm true and --rollout_engine {options.rollout_engine} contradict each other",
            ["fix: keep one of them"],
        )
    yield from _unread(config, engine, mode)
    if options.vllm_limit_mm_per_prompt is not None:
        yield Problem(
            "MC311",
            "--vllm_limit_mm_per_prompt cannot be honoured: prompts here are text",
            ["fix: leave the option out"],
        )
    if engine == "vllm":
        yield from _vllm(config, options)
    yield from _asynchrony(config, options)
    if options.multi_turn_scheduler is not None:
        yield from components.check(
            "mcore_schedulers", options.multi_turn_scheduler, "--multi_turn_scheduler"
        )
    elif options.max_turns is not None:
        yield Problem(
            "MC321",
            "--max_turns does nothing without --multi_turn_scheduler",
            ["fix: --multi_turn_scheduler NAME, or leave it out"],
        )


def _unread(config: RunConfig, engine: str, mode: str) -> Iterator[Problem]:
    """Options of another engine, or of the other mode."""
    of_vllm = f"--rollout_engine {engine}"
    unread: dict[str, tuple[str, str]] = {}
    if engine != "vllm":
        fix = "--use_vllm true"
        unread |= {name: (of_vllm, fix) for name in (*SERVER, *COLOCATE, *BOTH)}
    elif mode == "server":
        unread |= {name: ("--vllm_mode server", "--vllm_mode colocate") for name in COLOCATE}
    else:
        unread |= {name: ("--vllm_mode colocate", "--vllm_mode server") for name in SERVER}
    if engine != "native":
        unread |= {name: (of_vllm, "--rollout_engine native") for name in NATIVE}
    for name, (why, fix) in unread.items():
        if config.changed(name):
            notes = [f"fix: {fix}, or leave out --{name}"]
            if mode == "server" and name == "vllm_max_model_len":
                notes = ["fix: give it to `mcore rollout`, which starts the server"]
            yield Problem("MC321", f"--{name} does nothing with {why}", notes)


def _vllm(config: RunConfig, options: RolloutConfig) -> Iterator[Problem]:
    if options.mode == "server":
        hosts, ports = options.vllm_server_host or ["127.0.0.1"], options.vllm_server_port
        uneven = len(hosts) != len(ports) and min(len(hosts), len(ports)) > 1
        if options.vllm_server_base_url is None and uneven:
            yield Problem(
                "MC359",
                f"{len(hosts)} hosts and {len(ports)} ports of vLLM servers do not pair up",
                ["fix: one port for each host, or one for all"],
            )
        if options.vllm_server_base_url and options.vllm_server_host:
            yield Problem(
                "MC320",
                "--vllm_server_base_url and --vllm_server_host both name the servers",
                ["fix: keep one of them"],
            )
    if options.vllm_enable_lora and config.get("tuner_type") != "lora":
        yield Problem(
            "MC321",
            "--vllm_enable_lora true does nothing without adapters",
            ["fix: --tuner_type lora, or leave it out"],
        )
    if options.vllm_enable_lora:
        for name, none in (("modules_to_save", []), ("lora_bias", "none")):
            if name in config.names and config.get(name) != none:
                yield Problem(
                    "MC311",
                    f"--{name} cannot be honoured with --vllm_enable_lora true: vLLM takes "
                    "adapters, and not what trains beside them",
                    ["fix: leave --vllm_enable_lora out: merged weights are sent"],
                )


def _asynchrony(config: RunConfig, options: RolloutConfig) -> Iterator[Problem]:
    for name in ("max_staleness", "partial_rollouts"):
        if config.changed(name) and not options.async_generate:
            yield Problem(
                "MC321",
                f"--{name} does nothing without --async_generate",
                [f"fix: --async_generate true, or leave out --{name}"],
            )
    if not options.async_generate:
        return
    same = options.engine == "native" or (options.engine == "vllm" and options.mode == "colocate")
    if same:
        what = "native" if options.engine == "native" else "colocated vLLM"
        yield Problem(
            "MC360",
            f"--async_generate true: the {what} engine generates on the devices that train, so "
            "nothing would happen beside each other",
            ["fix: --use_vllm true --vllm_mode server with `mcore rollout`, or leave it out"],
        )
