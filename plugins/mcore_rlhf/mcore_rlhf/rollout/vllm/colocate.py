"""The vllm engine in colocate mode: vLLM in the training processes, on the same GPUs.

Each `vllm_tensor_parallel_size` neighbouring ranks are one vLLM, launched by the training run
itself (`external_launcher`). What is pending is generated when it is polled for: the policy's
memory can be lent to vLLM meanwhile.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mcore_core.checkpoint.state import gather_weights, rng_state, set_rng_state
from mcore_core.config.train import TrainConfig
from mcore_core.errors import usage_error
from mcore_core.failure import RunFailure
from mcore_rlhf.rollout.config import RolloutConfig
from mcore_rlhf.rollout.vllm import wire
from mcore_rlhf.rollout.vllm.aside import Aside, gradients_of, state_of, storages, weights_of
from mcore_rlhf.rollout.vllm.policy import ADAPTER_FILES, adapter, exported
from mcore_rlhf.rollout.vllm.serve import room_for

if TYPE_CHECKING:
    from mcore_core.protocols import Completion, EngineContext, Request

WORKER = "mcore_rlhf.rollout.vllm.inside.mcore_vllm_worker.PolicyWorker"


class VllmColocated:
    """Implements `protocols.RolloutEngine`. All but `cancel` is collective over all ranks."""

    def __init__(self, context: "EngineContext") -> None:
        """Start vLLM. Raises UsageError where there is no GPU, no vLLM, or not enough memory."""
        options = context.config[RolloutConfig]
        self.context, self.options = context, options
        self.version = -1
        self._waiting: dict[str, Request] = {}
        self._done: list[Completion] = []
        self._adapter: Any = None
        self._asleep = self._lost = self._lent = False
        self._group = _tensor_group(options.vllm_tensor_parallel_size)
        before = rng_state()
        self._llm = start(context)
        self._params = _sampling_class()
        (worker, *_) = self._llm.collective_rpc("mcore_prepare")
        set_rng_state(before)
        if worker["logps"] == "raw" and context.config.get("temperature") != 1:
            raise usage_error(
                "MC364",
                "this vLLM gives log-probabilities at temperature 1 only",
                "fix: --temperature 1, or a vLLM that mcore knows (0.20 to 0.32)",
            )
        self._state: Aside | None = None
        self._weights: tuple[Aside, Aside] | None = None
        self.sleep()

    # -- requests ----------------------------------------------------------------------------------

    def submit(self, requests: "Sequence[Request]") -> None:
        """Queue requests of this data-parallel rank."""
        for request in requests:
            if request.sampling.max_tokens <= 0:
                self._done.append(wire.nothing(request, "length"))
            else:
                self._waiting[request.id] = request

    def cancel(self, ids: Sequence[str]) -> None:
        """Drop requests that were not generated yet."""
        for key in ids:
            if key in self._waiting:
                self._done.append(wire.nothing(self._waiting.pop(key), "cancelled"))

    def poll(self, *, wait: bool = True) -> "list[Completion]":
        """Generate everything that is pending; `wait` makes no difference."""
        del wait
        requests = list(self._waiting.values())
        self._waiting = {}
        members = _sharers()
        mine = [r for i, r in enumerate(requests) if i % members.size == members.rank]
        made = self._generate(mine)
        for part in members.gather(made):
            self._done += part
        done, self._done = self._done, []
        return done

    def _generate(self, mine: "list[Request]") -> "list[Completion]":
        """Generate with the vLLM of this rank, which may be shared by several."""
        parts: list[list[Request]] = [mine]
        place = 0
        if self._group is not None:
            parts = [[] for _ in range(self._group.size())]
            dist.all_gather_object(parts, mine, group=self._group)
            place = self._group.rank()
        everything = [request for part in parts for request in part]
        if not everything:
            return []
        self._lend()
        before = rng_state()
        found = self._llm.generate(
            [{"prompt_token_ids": list(request.token_ids)} for request in everything],
            [self._params(**wire.parameters(request)) for request in everything],
            use_tqdm=False,
            lora_request=self._adapter,
        )
        set_rng_state(before)
        start = sum(len(part) for part in parts[:place])
        chosen = found[start : start + len(mine)]
        return [self._completion(r, f.outputs[0]) for r, f in zip(mine, chosen, strict=True)]

    def _completion(self, request: "Request", output: Any) -> "Completion":  # noqa: ANN401
        tokens = list(output.token_ids)
        line = {
            "tokens": tokens,
            "logps": [p[t].logprob for p, t in zip(output.logprobs or (), tokens, strict=True)],
            "versions": [[self.version, len(tokens)]],
            "stop": output.finish_reason,
        }
        return wire.completion(line, request, lambda _: "")

    # -- weights -----------------------------------------------------------------------------------

    def update_weights(self, *, step: int) -> None:
        """Load the policy's weights, or its adapter, from where they are."""
        self._return()
        self.version = step
        self._push()

    def _push(self) -> None:
        gather_weights(self.context.chunks)
        before = rng_state()
        if self.options.vllm_enable_lora:
            self._push_adapter()
        else:
            (found, *_) = self._llm.collective_rpc(
                "mcore_load_tensors", args=(exported(self.context), self.version)
            )
            if found["missing"]:
                raise RunFailure(
                    "MC846",
                    f"vLLM did not get all weights of step {self.version}",
                    f"missing: {', '.join(found['missing'][:8])}",
                )
        self._llm.reset_prefix_cache()
        set_rng_state(before)
        self._lost = False

    def _push_adapter(self) -> None:
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        folder = Path(tempfile.mkdtemp(prefix="mcore-adapter-"))
        for name, content in zip(ADAPTER_FILES, adapter(self.context), strict=True):
            (folder / name).write_bytes(content)
        number = 1 if self._adapter is None else self._adapter.lora_int_id + 1
        made = LoRARequest(f"mcore-{self.version}", number, str(folder))
        if not self._llm.llm_engine.add_lora(made):
            raise RunFailure("MC846", f"vLLM did not load the adapter of step {self.version}")
        if self._adapter is not None:
            self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
            shutil.rmtree(self._adapter.lora_path, ignore_errors=True)
        self._adapter = made

    # -- memory ------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Have vLLM's weights on the GPU; the optimizer makes room."""
        if self.options.offload_optimizer:
            if self._state is None:
                kept = storages(weights_of(self.context.chunks), self.context.device)
                state = [
                    tensor
                    for tensor in state_of(self.context.optimizer)
                    if tensor.untyped_storage().data_ptr() not in kept
                ]
                self._state = Aside(state, self.context.device, keep=True)
            self._state.leave()
        if self._asleep:
            self._llm.wake_up(tags=["weights"])

    def _lend(self) -> None:
        """Before generating: vLLM has weights and a cache, and the policy makes room."""
        if self._lost:
            self._push()
        if self.options.offload_model and not self._lent:
            device, chunks = self.context.device, self.context.chunks
            if self._weights is None:
                self._weights = (
                    Aside(weights_of(chunks), device, keep=True),
                    Aside(gradients_of(chunks), device, keep=False),
                )
            for part in self._weights:
                part.leave()
            self._lent = True
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False

    def _return(self) -> None:
        if self._weights is not None and self._lent:
            for part in self._weights:
                part.come_back()
        self._lent = False

    def sleep(self) -> None:
        """Give vLLM's memory back, as --sleep_level says, and take the policy's and optimizer's."""
        level = self.options.sleep_level
        if level and not self._asleep:
            self._llm.sleep(level)
            self._asleep = True
            self._lost = level == 2 and not self.options.vllm_enable_lora
        self._return()
        if self._state is not None:
            self._state.come_back()

    def close(self) -> None:
        """Free everything."""
        self._return()
        if self._state is not None:
            self._state.come_back()
        if self._adapter is not None:
            shutil.rmtree(self._adapter.lora_path, ignore_errors=True)
        self._llm = None


class _sharers:
    """The ranks that share a data-parallel rank's requests."""

    def __init__(self) -> None:
        model = parallel_state.get_model_parallel_group()
        context = parallel_state.get_context_parallel_group()
        self._groups = (model, context)
        self.size = model.size() * context.size()
        self.rank = context.rank() * model.size() + model.rank()

    def gather(self, mine: list[Any]) -> list[list[Any]]:
        """Return what each of them made."""
        parts = [mine]
        for group in self._groups:
            if group.size() > 1:
                several: list[list[list[Any]]] = [[] for _ in range(group.size())]
                dist.all_gather_object(several, parts, group=group)
                parts = [part for some in several for part in some]
        return parts


def _tensor_group(size: int) -> Any:  # noqa: ANN401
    """Return the group of ranks whose vLLM this rank is part of; None where it has one of its own.

    Raises:
        UsageError: The ranks do not divide.
    """
    world = dist.get_world_size()
    if world % size:
        raise usage_error(
            "MC367",
            f"--vllm_tensor_parallel_size {size} does not divide the {world} ranks",
            "fix: a divisor of them",
        )
    if size == 1:
        return None
    groups = [dist.new_group(list(range(k, k + size))) for k in range(0, world, size)]
    return groups[dist.get_rank() // size]


def start(context: "EngineContext") -> Any:  # noqa: ANN401
    """Return vLLM, in this process. Raises UsageError."""
    options = context.config[RolloutConfig]
    if context.device.type != "cuda":
        raise usage_error(
            "MC366",
            "--vllm_mode colocate runs on GPUs only",
            "fix: --vllm_mode server with `mcore rollout`, or --rollout_engine native",
        )
    rank, size = dist.get_rank(), dist.get_world_size()
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(context.device.index or 0),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import LLM  # noqa: PLC0415
    except ImportError as error:
        raise usage_error(
            "MC363",
            f"vLLM is not installed: {error}",
            "fix: uv pip install 'mcore-core[vllm]', or --rollout_engine native",
        ) from error
    try:
        return LLM(**arguments(context))
    except (ValueError, RuntimeError, torch.OutOfMemoryError) as error:
        raise usage_error(
            "MC366",
            "vLLM did not start in the training process",
            f"{type(error).__name__}: {error}"[:500],
            "fix: less --vllm_gpu_memory_utilization "
            f"(now {options.vllm_gpu_memory_utilization:g}) or --vllm_max_model_len",
        ) from error


def arguments(context: "EngineContext") -> dict[str, Any]:
    """Return what vLLM is started with."""
    options = context.config[RolloutConfig]
    found: dict[str, Any] = {
        "model": str(context.model_path),
        "dtype": str(context.plan.dtype).removeprefix("torch."),
        "tensor_parallel_size": options.vllm_tensor_parallel_size,
        "distributed_executor_backend": "external_launcher",
        "gpu_memory_utilization": options.vllm_gpu_memory_utilization,
        "max_model_len": options.vllm_max_model_len,
        "enforce_eager": options.vllm_enforce_eager,
        "enable_prefix_caching": options.vllm_enable_prefix_caching,
        "enable_sleep_mode": options.sleep_level > 0,
        "seed": context.config[TrainConfig].seed,
        "generation_config": "vllm",
        "logprobs_mode": "raw_logprobs",
        "worker_extension_cls": WORKER,
        "disable_log_stats": True,
    }
    if options.vllm_enable_lora:
        rank = room_for(int(context.config.get("lora_rank")))
        found |= {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": rank}
    return found


def _sampling_class() -> Any:  # noqa: ANN401
    from vllm import SamplingParams  # noqa: PLC0415

    return SamplingParams
