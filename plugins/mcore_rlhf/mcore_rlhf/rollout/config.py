"""Options of generating completions, which grpo and gkd share."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from mcore_core.config.group import ConfigGroup


class GenerationConfig(ConfigGroup):
    """How completions are sampled."""

    title: ClassVar[str] = "Generation"

    max_completion_length: int = Field(512, ge=1)
    """Tokens of a completion at most; of a conversation of several turns, everything after the
    prompt."""
    temperature: float = Field(0.9, gt=0)
    """Divides the logits when sampling, and also in the log-probabilities that train."""
    top_k: int = Field(50, ge=-1)
    """Sample among this many of the likeliest tokens. 0 and -1: among all."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Sample among the likeliest tokens that have this much of the probability together."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Divides the scores of tokens that have come already. 1: no penalty."""
    stop_words: list[str] = Field([])
    """Text that ends a completion, beside the model's end-of-turn token."""


class RolloutConfig(ConfigGroup):
    """The engine that generates."""

    title: ClassVar[str] = "Rollout"

    rollout_engine: str | None = None
    """native generates with the training weights themselves, vllm with a server or in this process;
    or the name of a plugin's engine. none: vllm where use_vllm is given, else native."""
    use_vllm: bool = False
    """Generate with vLLM."""
    vllm_mode: Literal["server", "colocate"] | None = None
    """server: with running `mcore rollout` servers. colocate: in the training processes, on the
    same GPUs. none: server where vllm_server_host or vllm_server_base_url is given, else
    colocate."""

    vllm_server_host: list[str] | None = None
    """Hosts of the servers."""
    vllm_server_port: list[int] = Field([8000])
    """Ports of the servers, one each, or one for all."""
    vllm_server_base_url: list[str] | None = None
    """Addresses of the servers (http://HOST:PORT), in place of host and port."""
    vllm_server_timeout: float = Field(240.0, gt=0)
    """Seconds to wait for servers to answer, at the start and when one was restarted."""
    vllm_server_pass_dataset: bool = False
    """Send the dataset's row along with each request, for a server of your own that reads it."""

    vllm_gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of the GPU's memory that a colocated vLLM may use."""
    vllm_max_model_len: int | None = Field(None, ge=1)
    """Tokens of prompt and completion that vLLM makes room for. none: as the model says."""
    vllm_enforce_eager: bool = False
    """Run vLLM without CUDA graphs."""
    vllm_limit_mm_per_prompt: dict[str, Any] | None = None
    """Images and videos in a prompt, as JSON."""
    vllm_enable_prefix_caching: bool = True
    """Let vLLM keep what prompts that begin alike have in common."""
    vllm_tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that share a colocated vLLM: a divisor of the ranks."""
    vllm_enable_lora: bool = False
    """Send vLLM the adapter alone after a step, rather than merged weights."""
    sleep_level: int = Field(0, ge=0, le=2)
    """What a colocated vLLM gives back while the policy trains: 0 nothing, 1 the cache and, to the
    host, the weights, 2 both for good; the weights are sent anew."""
    offload_optimizer: bool = False
    """Move the optimizer to the host while a colocated vLLM generates."""
    offload_model: bool = False
    """Move the policy to the host while a colocated vLLM generates."""

    async_generate: bool = False
    """Generate the next batch while the policy trains on this one; needs vllm in server mode."""
    max_staleness: int = Field(1, ge=1)
    """With async_generate: how many batches may be generated ahead."""
    partial_rollouts: bool = False
    """With async_generate: give the engine new weights while completions are being generated, which
    then go on with them. Otherwise it gets them when nothing is being generated."""

    multi_turn_scheduler: str | None = None
    """What answers the model's turns in conversations of several: the name of a plugin's scheduler
    or ./FILE.py:CLASS. none: one turn."""
    max_turns: int | None = Field(None, ge=1)
    """Turns of the model in a conversation at most. none: as many as the scheduler gives."""

    @property
    def engine(self) -> str:
        """The engine's name."""
        return self.rollout_engine or ("vllm" if self.use_vllm else "native")

    @property
    def mode(self) -> str:
        """How vLLM runs."""
        if self.vllm_mode is not None:
            return self.vllm_mode
        given = self.vllm_server_host is not None or self.vllm_server_base_url is not None
        return "server" if given else "colocate"

    @property
    def servers(self) -> tuple[str, ...]:
        """The addresses of the servers."""
        if self.vllm_server_base_url is not None:
            return tuple(url.rstrip("/") for url in self.vllm_server_base_url)
        hosts = self.vllm_server_host or ["127.0.0.1"]
        ports = self.vllm_server_port
        if len(hosts) == 1:
            hosts = hosts * len(ports)
        elif len(ports) == 1:
            ports = ports * len(hosts)
        return tuple(f"http://{host}:{port}" for host, port in zip(hosts, ports, strict=True))

    @property
    def staleness(self) -> int:
        """How many batches are generated ahead."""
        return self.max_staleness if self.async_generate else 0
