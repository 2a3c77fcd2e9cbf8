"""One pass through the model for generation: every stage, then the logits of chosen tokens.

Shapes: T tokens of a row, N tokens whose logits are wanted, V vocabulary, H hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mcore_core.model.names import unwrap

if TYPE_CHECKING:
    from mcore_core.model.build import ModelPlan
    from mcore_core.model.packed import PackedRow


class Forward:
    """The policy's chunks on this rank, run stage after stage without gradients."""

    def __init__(self, chunks: Sequence[Any], plan: "ModelPlan") -> None:
        self.chunks, self.plan = list(chunks), plan
        self.decoders = [unwrap(chunk) for chunk in chunks]
        self._modules = [m for decoder in self.decoders for m in decoder.modules()]
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.pp_group = parallel_state.get_pipeline_model_parallel_group()
        self.ranks = dist.get_process_group_ranks(self.pp_group)
        self.stage = self.pp_group.rank()
        self.last = bool(self.decoders[-1].post_process)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch dropout off, and nothing records gradients."""
        # Module.train() takes a millisecond even for small models, several times a round
        training = [m for m in self._modules if m.training]
        for module in training:
            vars(module)["training"] = False
        try:
            # not inference mode: megatron keeps buffers that training uses again
            with torch.no_grad():
                yield
        finally:
            for module in training:
                vars(module)["training"] = True

    def hidden(self, tokens_T: Tensor, row: "PackedRow") -> Tensor | None:
        """Return the last stage's hidden states [T, H]; None on other stages."""
        stages, pp = self.plan.layout.stages, self.plan.layout.pp
        found = None
        for virtual, decoder in enumerate(self.decoders):
            index = virtual * pp + self.stage
            if index > 0 and pp > 1:
                decoder.set_input_tensor(self._receive(len(tokens_T), tokens_T.device))
            found = decoder(tokens_T, row)
            if index < stages - 1:
                dist.send(found.contiguous(), self.ranks[(self.stage + 1) % pp], self.pp_group)
                decoder.set_input_tensor(None)
        if not self.last:
            return None
        assert found is not None
        if self.plan.layout.sp:
            parts = found.new_empty(len(tokens_T), *found.shape[1:])
            dist.all_gather_into_tensor(parts, found.contiguous(), group=self.tp_group)
            found = parts
        hidden_TH: Tensor = found.squeeze(1)
        return hidden_TH

    def _receive(self, tokens: int, device: torch.device) -> Tensor:
        layout = self.plan.layout
        rows = tokens // layout.tp if layout.sp else tokens
        hidden = torch.empty(
            rows, 1, self.plan.architecture.hidden_size, dtype=self.plan.dtype, device=device
        )
        dist.recv(hidden, self.ranks[(self.stage - 1) % layout.pp], self.pp_group)
        return hidden

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Return the logits of the real vocabulary on the last stage, [N, V], float32."""
        weight: Tensor = self.decoders[-1].head_weight()
        logits = hidden_NH @ weight.t()
        if self.tp_group.size() > 1:
            logits = logits.float().contiguous()
            parts = [torch.empty_like(logits) for _ in range(self.tp_group.size())]
            dist.all_gather(parts, logits, group=self.tp_group)
            logits = torch.cat(parts, -1)
        return logits[:, : self.plan.architecture.vocab_size].float()

    def share(self, values: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Give every rank of the model what tensor-parallel rank 0 of the last stage has."""
        tp, pp = self.tp_group.size(), self.pp_group.size()
        if values is None:
            values = torch.empty(shape, dtype=torch.float64, device=device)
        if tp > 1 and self.last:
            first = dist.get_process_group_ranks(self.tp_group)[0]
            dist.broadcast(values, first, group=self.tp_group)
        if pp > 1:
            dist.broadcast(values, self.ranks[-1], group=self.pp_group)
        return values
