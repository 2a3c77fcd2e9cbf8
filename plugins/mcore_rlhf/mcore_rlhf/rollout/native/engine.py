"""The native engine: prompts are read together, then one token of every completion a step.

What finishes makes room for what waits, so that steps stay full. On a GPU the host looks at what
was generated once in several steps. Every rank of a model takes the same decisions from the same
numbers; only the last pipeline stage samples, and tells the others.

Shapes: N rows of a pass whose next token is wanted.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mcore_core.checkpoint.state import gather_weights
from mcore_core.model.decode import DecodeState, has_kernel
from mcore_core.parallel.reduce import any_rank
from mcore_rlhf.rollout.native import rows, stop
from mcore_rlhf.rollout.native.config import NativeConfig
from mcore_rlhf.rollout.native.forward import Forward
from mcore_rlhf.rollout.native.graphs import Graphs, refusal
from mcore_rlhf.rollout.native.memory import (
    head_sizes,
    prompt_tokens_that_fit,
    slots_that_fit,
)
from mcore_rlhf.rollout.native.routing import recorder_of, routed
from mcore_rlhf.rollout.native.sample import Choice, sample, uniforms
from mcore_rlhf.rollout.native.slots import Ints, Pending, Slots
from mcore_rlhf.rollout.native.steps import Size, Steps

if TYPE_CHECKING:
    from mcore_core.protocols import Completion, EngineContext, Request, Sampling

MOST_SLOTS = {"cpu": 256, "cuda": 512}
STEPS = {"cpu": 1, "cuda": 8}
"""Steps between two looks of the host: a GPU need not wait, and what ended runs on meanwhile."""
ROUND = 64
"""Capacities are multiples of this."""


class NativeEngine:
    """Generates with the policy's own weights; implements `protocols.RolloutEngine`.

    With expert parallelism over data-parallel ranks (`lockstep`) the ranks pass through the model
    together: then `poll` is collective over all ranks and returns when all requests are done.
    """

    def __init__(self, context: "EngineContext") -> None:
        options = context.config[NativeConfig]
        self.plan, self.device, self.tokenizer = context.plan, context.device, context.tokenizer
        self.options = options
        self.forward = Forward(context.chunks, context.plan)
        self.multiple = rows.row_multiple(context.plan)
        self.cp_group = parallel_state.get_context_parallel_group()
        layout = context.plan.layout
        self.lockstep = layout.ep * layout.etp > layout.tp
        """Whether experts are spread over ranks that generate different completions."""
        self.few_sizes = self.device.type == "cuda"
        """Whether steps are padded so that few different ones come up."""
        self.most_steps = STEPS[self.device.type]
        self.fused = has_kernel(context.plan.dtype, self.device, head_sizes(context.plan))
        self.unrecorded = refusal(context.plan, self.forward, self.device)
        """Why steps are not recorded as CUDA graphs; None where they are."""
        if not options.native_cuda_graphs:
            self.unrecorded = "native_cuda_graphs is off"
        self.routing = recorder_of(context)
        if self.routing is not None:
            self.unrecorded, self.most_steps = "routing is recorded, token by token", 1
        graphs = None if self.unrecorded else Graphs(self.device)
        self._steps = Steps(self.forward, self.device, graphs, most=self.most_steps)
        self.version: int | None = None
        self._weights: list[int] = []
        self._prompt_tokens = 0
        self._state: DecodeState | None = None
        self._most = 0
        self._queue: deque[Pending] = deque()
        self._slots = Slots()
        self._done: list[Completion] = []
        self._seen: Tensor | None = None
        self._submitted = 0
        self._longest = 0
        """Tokens of the longest request, prompt and completion, that is not done."""
        self._choices: dict[Sampling, Choice] = {}
        self._present: Choice | None = None
        """Of all slots in use; None: they have changed."""

    def submit(self, requests: "Sequence[Request]") -> None:
        """Queue requests of this data-parallel rank; its context-parallel ranks share them out."""
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        if not self._busy:
            self._longest = 0
        for request in requests:
            if not request.token_ids:
                raise ValueError(f"request {request.id} has no prompt")
            mine = self._submitted % cp == rank
            self._submitted += 1
            if mine:
                stops = stop.stop_ids(request.sampling, self.tokenizer)
                pending = Pending(request, stops)
                self._queue.append(pending)
                self._longest = max(self._longest, pending.room)

    def poll(self, *, wait: bool = True) -> "list[Completion]":
        """Return what finished; without `wait` at most one pass through the model is made."""
        recording = nullcontext() if self.routing is None else self.routing.recording()
        with self.forward.evaluating(), recording:
            steps = self.most_steps if wait and not self.lockstep else 1
            if self.lockstep:
                while any_rank(self._busy, self.device):
                    self._pass(steps)
                    if not wait:
                        break
            else:
                while self._busy and not self._done:
                    self._pass(steps)
                    if not wait:
                        break
        done, self._done = self._done, []
        if self.cp_group.size() > 1:
            everyone: list[list[Completion]] = [[] for _ in range(self.cp_group.size())]
            dist.all_gather_object(everyone, done, group=self.cp_group)
            done = [one for part in everyone for one in part]
        return done

    def cancel(self, ids: Sequence[str]) -> None:
        """End requests early."""
        wanted = set(ids)
        waiting = [p for p in self._queue if p.request.id in wanted]
        self._queue = deque(p for p in self._queue if p.request.id not in wanted)
        self._done += [p.completion("cancelled") for p in waiting]
        where = [i for i, p in enumerate(self._slots.pending) if p.request.id in wanted]
        self._done += [self._slots.progress(i).completion("cancelled") for i in where]
        self._remove(np.array(where, np.int64))

    def update_weights(self, *, step: int) -> None:
        """Sample with the weights as they are now; what is being generated is read anew."""
        gather_weights(self.forward.chunks)
        weights = [p.data_ptr() for decoder in self.forward.decoders for p in decoder.parameters()]
        if weights != self._weights:
            self._steps.clear()
        self.version, self._weights = step, weights
        under_way = [self._slots.progress(i) for i in range(len(self._slots))]
        self._queue.extendleft(reversed(under_way))
        self._slots, self._present = Slots(), None

    def sleep(self) -> None:
        """Free keys and values."""
        self._steps.clear()
        self._state = self._seen = None

    def wake(self) -> None:
        """Memory is taken with the next requests."""

    def close(self) -> None:
        """Free everything."""
        self._queue.clear()
        self._slots, self._done = Slots(), []
        self.sleep()

    @property
    def _busy(self) -> bool:
        return bool(self._queue or len(self._slots))

    def _pass(self, steps: int) -> None:
        """Run the model over new prompts, else over one token of each slot, `steps` times."""
        assert self.version is not None, "update_weights comes first"
        if new := self._admit():
            self._read(new)
        elif len(self._slots):
            self._step(steps)
        else:  # other ranks' experts wait for this one
            self.forward.hidden(*self._idle())

    def _idle(self) -> tuple[Tensor, Any]:
        state = DecodeState(1, self.multiple)
        empty = np.zeros(0, np.int64)
        row = rows.prompts([], empty, state, multiple=self.multiple, device=self.device)
        return row.tokens_T, row.row

    def _admit(self) -> list[Pending]:
        """Take requests from the queue that have a slot, once enough slots are free to be worth it.

        What reaches its limit with no token left to generate is done.
        """
        while self._queue and self._queue[0].request.sampling.max_tokens <= 0:
            self._done.append(self._queue.popleft().completion("length"))
        if not self._queue:
            return []
        self._make_room()
        free = self._most - len(self._slots)
        if free < min(len(self._queue), max(1, self._most // 4)) and len(self._slots):
            return []
        new: list[Pending] = []
        budget, seen = self._prompt_tokens, set[tuple[int, ...]]()
        while self._queue and len(new) < free:
            prompt = self._queue[0].prompt
            if prompt not in seen:
                budget -= len(prompt)
                if budget < 0 and seen:
                    break
                seen.add(prompt)
            new.append(self._queue.popleft())
        return new

    def _make_room(self) -> None:
        """Have keys and values for the longest request that waits."""
        wanted = self._longest
        if self._state is None:
            self._state, self._most = DecodeState(0, 0), 0
        if wanted > self._state.capacity or not self._most:
            self._measure(self._state, wanted)
        if self.few_sizes:  # room for all that will come: what is recorded reads it where it lies
            number = min(self._most, len(self._slots) + len(self._queue))
            self._grow(self._size(number, 1).rows)

    def _grow(self, slots: int, capacity: int = 0) -> None:
        assert self._state is not None
        if self._state.grow(slots, capacity):
            self._steps.clear()

    def _measure(self, state: DecodeState, wanted: int) -> None:
        """Find out how many slots of so many tokens there is memory for."""
        capacity = max(state.capacity, -(-wanted // ROUND) * ROUND)
        fit = slots_that_fit(
            self.plan,
            max(self.plan.stage_layers) * (self.plan.layout.vpp or 1),
            capacity,
            self.options.native_kv_gib,
            self.device,
        )
        most = self.options.native_slots or MOST_SLOTS[self.device.type]
        self._most = max(1, min(fit, most))
        self._grow(state.slots, capacity)
        self._prompt_tokens = prompt_tokens_that_fit(self.plan, self.device)

    def _read(self, new: list[Pending]) -> None:
        """Read prompts, each different one once, and sample the first token of every request."""
        state = self._state
        assert state is not None
        where_N = self._slots.add(new, multiple=self.multiple)
        self._present = None
        self._grow(len(self._slots.last))
        first: dict[tuple[int, ...], int] = {}
        which_N = np.array([first.setdefault(p.prompt, len(first)) for p in new])
        _, leaders = np.unique(which_N, return_index=True)
        sequences = list(first)
        row = rows.prompts(
            sequences, where_N[leaders], state, multiple=self.multiple, device=self.device
        )
        hidden_TH = self.forward.hidden(row.tokens_T, row.row)
        if self.routing is not None:
            routing_TLK = routed(self.routing, len(row.tokens_T), self.device)
            bounds = np.concatenate(([0], np.cumsum([len(s) for s in sequences])))
            for slot, which in zip(where_N.tolist(), which_N.tolist(), strict=True):
                self._slots.note_prompt(slot, routing_TLK[bounds[which] : bounds[which + 1]])
        copies = np.setdiff1d(np.arange(len(new)), leaders)
        if len(copies):
            source = where_N[leaders[which_N[copies]]]
            state.copy(self._move(source), self._move(where_N[copies]))
        self._note_prompts(where_N)
        ends = np.cumsum([len(s) for s in sequences])[which_N] - 1
        hidden_NH = None if hidden_TH is None else hidden_TH.index_select(0, self._move(ends))
        self._first(hidden_NH, where_N)

    def _size(self, number: int, keys: int) -> Size:
        assert self._state is not None
        return rows.step_size(
            number,
            keys,
            multiple=self.multiple,
            most=self._most,
            capacity=self._state.capacity,
            few=self.few_sizes,
            fused=self.fused,
        )

    def _step(self, steps: int) -> None:
        """Generate tokens in every slot, and take out those that are done."""
        slots, number = self._slots, len(self._slots)
        assert self._state is not None
        steps = min(steps, int((slots.limit - slots.count)[:number].max()))
        size = self._size(number, int(slots.position[:number].max()) + steps)
        if self._present is None:
            self._present = self._choice(np.arange(number))
        read_N = slots.position[:number].copy()
        penalized = self._present.penalty_N1 is not None
        tokens_KN, logps_KN = self._steps.run(
            slots,
            self._state,
            self._present,
            self._seen if penalized else None,
            size=size,
            steps=steps,
        )
        if self.routing is not None:
            slots.note_step(read_N, routed(self.routing, size.rows, self.device)[:number])
        alive_N, gone = np.arange(number), []
        for tokens_N, logps_N in zip(tokens_KN, logps_KN, strict=True):
            ended = self._record(alive_N, tokens_N[alive_N], logps_N[alive_N])
            gone.append(alive_N[ended])
            alive_N = alive_N[~ended]
        self._remove(np.sort(np.concatenate(gone)))

    def _first(self, hidden_NH: Tensor | None, where_N: Ints) -> None:
        """Sample the first token of some slots, and take out those that are done."""
        slots, found = self._slots, None
        if hidden_NH is not None:
            choice = self._choice(where_N)
            keys_N, count_N = slots.keys[where_N].view(np.int64), slots.count[where_N]
            random_N = uniforms(self._move(keys_N), self._move(count_N))
            seen_NV = None
            if choice.penalty_N1 is not None and self._seen is not None:
                seen_NV = self._seen[self._move(where_N)]
            tokens_N, logps_N = sample(self.forward.logits(hidden_NH), random_N, choice, seen_NV)
            found = torch.stack((tokens_N.double(), logps_N.double()))
        shared = self.forward.share(found, (2, len(where_N)), self.device)
        numbers, logps = shared.cpu().numpy()
        tokens = numbers.astype(np.int64)
        if self._seen is not None:
            self._seen[self._move(where_N), self._move(tokens)] = True
        self._remove(where_N[self._record(where_N, tokens, logps)])

    def _record(self, where_N: Ints, tokens: Ints, logps: Any) -> Any:  # noqa: ANN401
        """Note the next token of some slots; return which of them ended with it, [N]."""
        slots = self._slots
        assert self.version is not None
        slots.record(where_N, tokens, logps, self.version)
        stopped = (slots.stops[where_N] == tokens[:, None]).any(1)
        for i in np.flatnonzero(slots.words[where_N] & ~stopped).tolist():
            slot = int(where_N[i])
            words, n = slots.pending[slot].request.sampling.stop, int(slots.count[slot])
            tail = slots.tokens[slot, max(0, n - stop.reach(words)) : n].tolist()
            stopped[i] = stop.hits(words, tail, self.tokenizer)
        ended = stopped | (slots.count[where_N] >= slots.limit[where_N])
        for i in np.flatnonzero(ended).tolist():
            reason: Any = "stop" if stopped[i] else "length"
            self._done.append(slots.progress(int(where_N[i])).completion(reason))
        return ended

    def _remove(self, where: Ints) -> None:
        if not len(where):
            return
        source, target = self._slots.remove(where)
        self._present = None
        if not len(source):
            return
        assert self._state is not None
        with torch.no_grad():
            a, b = self._move(source), self._move(target)
            self._state.copy(a, b)
            if self._seen is not None:
                self._seen.index_copy_(0, b, self._seen.index_select(0, a))

    def _choice(self, where_N: Ints) -> Choice:
        """Return the settings of slots; one row of them where all are alike."""
        pending = self._slots.pending
        settings = [pending[i].request.sampling for i in where_N.tolist()]
        first, vocab = settings[0], self.plan.architecture.vocab_size
        if any(s is not first and s != first for s in settings):
            return Choice.of(settings, vocab, self.device)
        if first not in self._choices:
            self._choices = {first: Choice.of([first], vocab, self.device)}
        return self._choices[first]

    def _note_prompts(self, where_N: Ints) -> None:
        """Remember which tokens the prompts have, where a penalty needs to know."""
        pending = self._slots.pending
        if all(p.request.sampling.repetition_penalty == 1.0 for p in pending):
            self._seen = None
            return
        assert self._state is not None
        vocab = self.plan.architecture.vocab_size
        rows_now = max(len(self._slots.last), self._state.slots)
        before = self._seen
        if before is None or len(before) < rows_now:
            self._seen = torch.zeros(rows_now, vocab, dtype=torch.bool, device=self.device)
            again: Ints = np.arange(len(pending))
        else:
            again = where_N
        assert self._seen is not None
        for slot in again.tolist():
            self._seen[slot] = False
            tokens = self._slots.progress(slot).prompt
            self._seen[slot, torch.tensor(tokens, device=self.device)] = True

    def _move(self, array: Any) -> Tensor:  # noqa: ANN401
        return torch.from_numpy(array).to(self.device, non_blocking=True)
