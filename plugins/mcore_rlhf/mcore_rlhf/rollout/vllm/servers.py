"""The vllm engine in server mode.

Of the ranks that share a data-parallel rank one speaks with the servers, and tells the others. All
ranks take part in putting the weights together; the first one gives them to the servers.
"""

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mcore_core.checkpoint.state import gather_weights
from mcore_core.errors import usage_error
from mcore_core.failure import RunFailure
from mcore_core.train.services import once
from mcore_rlhf.rollout.config import GenerationConfig, RolloutConfig
from mcore_rlhf.rollout.vllm import files, wire
from mcore_rlhf.rollout.vllm.fleet import Fleet, Policy, connect
from mcore_rlhf.rollout.vllm.policy import ADAPTER_FILES, adapter, exported, from_first
from mcore_rlhf.rollout.vllm.send import Load, Sender

if TYPE_CHECKING:
    from mcore_core.protocols import Completion, EngineContext, Request


class VllmServers:
    """Implements `protocols.RolloutEngine`."""

    def __init__(self, context: "EngineContext") -> None:
        """Connect to every server. Raises UsageError where one is not there, or does not fit."""
        options = context.config[RolloutConfig]
        self.context, self.options = context, options
        self.leader = (
            parallel_state.get_model_parallel_group().rank() == 0
            and parallel_state.get_context_parallel_rank() == 0
        )
        self.first = dist.get_rank() == 0
        timeout = options.vllm_server_timeout
        owner, states = from_first(lambda: (uuid.uuid4().hex, connect(options.servers, timeout)))
        self.states: list[wire.State] = states
        from_first(self._check)
        self.dtype: torch.dtype = getattr(torch, states[0].dtype)
        self.policy = Policy(owner)
        self._pending: dict[str, int] = {}
        self._fleet: Fleet | None = None
        self._sender: Sender | None = None
        self._folder: files.WeightFolder | None = None
        if self.leader:
            self._fleet = Fleet(
                options.servers,
                timeout=timeout,
                policy=self.policy,
                decode=self._decode,
                with_rows=options.vllm_server_pass_dataset,
                warn=self._warn,
            )
        if self.first:
            self._folder = files.WeightFolder(files.size_of(context.model_path))
            self._sender = Sender(options.servers, owner=owner, timeout=timeout, warn=self._warn)

    def _check(self) -> None:
        generation = self.context.config[GenerationConfig]
        vocab = self.context.plan.architecture.vocab_size
        for url, state in zip(self.options.servers, self.states, strict=True):
            where = f"the vLLM server at {url}"
            if state.protocol != wire.PROTOCOL:
                raise usage_error(
                    "MC369",
                    f"{where} speaks another protocol ({state.protocol}; this is {wire.PROTOCOL})",
                    "fix: start it with the `mcore rollout` of this version",
                )
            if state.vocab_size != vocab:
                raise usage_error(
                    "MC364",
                    f"{where} has another model: {state.model}",
                    f"its vocabulary has {state.vocab_size} tokens, the policy's {vocab}",
                    f"fix: mcore rollout --model {self.context.model_path}",
                )
            if state.max_lora_rank is None and self.options.vllm_enable_lora:
                raise usage_error(
                    "MC364",
                    f"{where} takes no adapters",
                    "fix: start it with --vllm_enable_lora true, or leave the option out here",
                )
            if state.logps == "raw" and generation.temperature != 1:
                raise usage_error(
                    "MC364",
                    f"{where} (vLLM {state.vllm}) gives log-probabilities at temperature 1 only",
                    "fix: --temperature 1, or a vLLM that `mcore rollout` knows (0.20 to 0.32)",
                )

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self.context.tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text

    def _warn(self, text: str) -> None:
        if self.context.warn is not None:
            self.context.warn(text)

    # -- requests ----------------------------------------------------------------------------------

    def submit(self, requests: "Sequence[Request]") -> None:
        """Send requests to the servers."""
        assert self.policy.version >= 0, "update_weights comes first"
        room = min(state.max_model_len for state in self.states)
        for request in requests:
            needs = len(request.token_ids) + request.sampling.max_tokens
            if needs > room:
                raise RunFailure(
                    "MC845",
                    f"a prompt of {len(request.token_ids)} tokens and a completion of "
                    f"{request.sampling.max_tokens} do not fit in the vLLM server's {room}",
                    f"fix: mcore rollout --vllm_max_model_len {needs} or more, or a smaller "
                    "--max_completion_length",
                )
            self._pending[request.id] = needs
        if self._fleet is not None:
            self._fleet.submit(requests)

    def poll(self, *, wait: bool = True) -> "list[Completion]":
        """Return what is done. Raises RunFailure where the servers stay away."""
        found = once(lambda: self._collect(wait=wait))
        for completion in found:
            self._pending.pop(completion.id, None)
        return found

    def _collect(self, *, wait: bool) -> "list[Completion]":
        assert self._fleet is not None
        if self._sender is not None:
            self._sender.check()
        return self._fleet.collect(wait=wait and bool(self._pending))

    def cancel(self, ids: Sequence[str]) -> None:
        """Have requests end; `poll` returns what they have."""
        known = [key for key in ids if key in self._pending]
        if self._fleet is not None and known:
            self._fleet.cancel(known)

    # -- weights -----------------------------------------------------------------------------------

    def update_weights(self, *, step: int) -> None:
        """Give the servers the policy's weights, or its adapter; what they generate goes on."""
        sender = self._sender
        if sender is None:
            self._export()
            from_first(None)
        else:
            with sender.exclusive():
                load = Load(step, *self._export())
                from_first(lambda: sender.give(load))
        self.policy.version = step

    def _export(self) -> Any:  # noqa: ANN401
        """Write the weights, on the first rank; collective. Returns their kind and files."""
        context, folder = self.context, None
        gather_weights(context.chunks)
        if self._folder is not None:
            folder = self._folder.fresh()
        if self.options.vllm_enable_lora:
            contents = adapter(context)
            if folder is None:
                return "adapter", []
            paths = [folder / name for name in ADAPTER_FILES]
            for path, content in zip(paths, contents, strict=True):
                path.write_bytes(content)
            return "adapter", paths
        return "weights", files.write(exported(context), folder, self.dtype)

    def sleep(self) -> None:
        """Nothing is held here."""

    def wake(self) -> None:
        """Nothing to take."""

    def close(self) -> None:
        """Let the servers be."""
        if self._sender is not None:
            self._sender.close()
        if self._fleet is not None:
            self._fleet.close()
        if self._folder is not None:
            self._folder.close()
