"""Decode steps on the device: several in a row between two looks of the host.

Everything that a step reads and writes lies in buffers that stay where they are, and nothing in it
depends on a value that the host would have to fetch: so a step can be recorded as a CUDA graph.

Shapes: R rows of a step (slots in use and what fills them up), N of them whose tokens are wanted,
K steps.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mcore_core.model.decode import DecodeState, Kept
from mcore_core.model.packed import PackedRow
from mcore_rlhf.rollout.native.sample import Choice, sample, uniforms

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcore_rlhf.rollout.native.forward import Forward
    from mcore_rlhf.rollout.native.graphs import Graphs
    from mcore_rlhf.rollout.native.slots import Slots

_INTS = ("last", "position", "count", "keys")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What decides which kernels steps launch."""

    rows: int
    """Slots that the model sees."""
    wanted: int
    """The first of these, for which tokens are sampled."""
    keys: int
    """Positions that are looked at, where a slot's length cannot be read on the device."""


class Steps:
    """Runs decode steps; keeps their buffers.

    Args:
        forward: The model.
        device: Where it is.
        graphs: Records steps; None: they run as they are.
        most: Steps between two looks of the host, at most.
    """

    def __init__(
        self, forward: "Forward", device: torch.device, graphs: "Graphs | None", *, most: int
    ) -> None:
        self.forward, self.device, self.graphs, self.most = forward, device, graphs, most
        self._rows = 0
        self._held: Choice | None = None
        self._settings: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Forget what was recorded: tensors that it reads have moved, or are to be freed."""
        if self.graphs is not None:
            self.graphs.clear()

    def run(
        self,
        slots: "Slots",
        state: DecodeState,
        choice: Choice,
        seen: Tensor | None,
        *,
        size: Size,
        steps: int,
    ) -> "tuple[NDArray[np.int64], NDArray[np.float64]]":
        """Generate `steps` tokens in every slot.

        Args:
            slots: What they generated last; the last token of each is not in the state yet.
            state: Keys and values of at least `size.rows` slots.
            choice: How each chooses.
            seen: True for tokens that a slot has already, [slots, V]; None where nobody asks.
            size: How many rows and positions there are.
            steps: At most `most`.

        Returns:
            Tokens and their log-probabilities, each [K, N]. A slot's tokens go on after its end.
        """
        self._fit(max(size.rows, state.slots))
        self._upload(slots, size.rows)
        choice = self._hold(choice, size.wanted)
        kinds = (choice.all_greedy, choice.largest_k, *choice.tensors)
        key = (size, kinds, seen is None or seen.data_ptr())

        def step() -> None:
            self._step(state, choice, seen, size)

        for _ in range(steps):
            if self.graphs is None:
                step()
            else:
                self.graphs.run(key, step)
        tokens, logps = self._out[:steps, :, : size.wanted].cpu().numpy().swapaxes(0, 1)
        return tokens.astype(np.int64), logps

    def _step(self, state: DecodeState, choice: Choice, seen: Tensor | None, size: Size) -> None:
        """Generate one token in every slot: from buffers, into buffers."""
        rows, wanted = size.rows, size.wanted
        last_R, position_R, count_R, key_R = self._ints[:, :rows]
        kept = Kept(state, self._slots[:rows], position_R, keys=size.keys)
        row = PackedRow(qkv_format="thd", positions_T=position_R, kept=kept)
        hidden_RH = self.forward.hidden(last_R, row)
        found = None
        if hidden_RH is not None:
            logits_NV = self.forward.logits(hidden_RH[:wanted])
            random_N = uniforms(key_R[:wanted], count_R[:wanted])
            known_NV = None if seen is None else seen[:wanted]
            tokens_N, logps_N = sample(logits_NV, random_N, choice, known_NV)
            found = torch.stack((tokens_N.double(), logps_N.double()))
        found = self.forward.share(found, (2, wanted), self.device)
        tokens_N = found[0].long()
        self._out[:, :, :wanted].index_copy_(0, self._at, found.unsqueeze(0))
        if seen is not None:
            seen[self._slots[:wanted], tokens_N] = True
        last_R[:wanted] = tokens_N
        position_R.add_(1).clamp_(max=state.capacity - 1)  # slots that ended may run on
        count_R.add_(1)
        self._at.add_(1)

    def _fit(self, rows: int) -> None:
        """Have buffers for so many rows."""
        if rows <= self._rows:
            return
        self.clear()
        self._rows = rows
        pinned: dict[str, Any] = {"pin_memory": True} if self.device.type == "cuda" else {}
        self._host = torch.zeros(len(_INTS), rows, dtype=torch.long, **pinned)
        self._ints = torch.zeros(len(_INTS), rows, dtype=torch.long, device=self.device)
        self._slots = torch.arange(rows, device=self.device)
        self._at = torch.zeros(1, dtype=torch.long, device=self.device)
        self._out = torch.zeros(self.most, 2, rows, dtype=torch.float64, device=self.device)
        self._held, self._settings = None, {}

    def _upload(self, slots: "Slots", rows: int) -> None:
        host = self._host.numpy()
        number = min(rows, len(slots.last))
        for i, name in enumerate(_INTS):
            host[i, :number] = getattr(slots, name)[:number].view(np.int64)
            host[i, number:rows] = 0
        self._ints.copy_(self._host, non_blocking=True)
        self._at.zero_()

    def _hold(self, choice: Choice, rows: int) -> Choice:
        """Return the settings with their values in buffers of ours, a row a slot."""
        given = choice.tensors
        if self.graphs is None and all(len(values) == 1 for values in given.values()):
            return choice
        for name, values in given.items():
            if name not in self._settings:
                self._settings[name] = values[:1].expand(self._rows, *values.shape[1:]).clone()
            if choice is not self._held:
                held = self._settings[name]
                where = held if len(values) == 1 else held[: len(values)]
                where.copy_(values.expand_as(where))
        self._held = choice
        changes: dict[str, Any] = {name: self._settings[name][:rows] for name in given}
        return replace(choice, **changes)
