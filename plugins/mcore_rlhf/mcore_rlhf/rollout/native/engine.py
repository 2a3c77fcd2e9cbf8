"""The native engine: prompts are read together, then one token of every completion a step.

What finishes makes room for what waits, so that steps stay full. Every rank of a model takes the
same decisions from the same numbers; only the last pipeline stage samples, and tells the others.

Shapes: N rows of a pass whose next token is wanted.
"""

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mcore_core.checkpoint.state import gather_weights
from mcore_core.model.decode import DecodeState
from mcore_core.parallel.reduce import any_rank
from mcore_rlhf.rollout.native import rows, stop
from mcore_rlhf.rollout.native.config import NativeConfig
from mcore_rlhf.rollout.native.forward import Forward
from mcore_rlhf.rollout.native.memory import slots_that_fit
from mcore_rlhf.rollout.native.sample import Choice, sample, uniforms
from mcore_rlhf.rollout.native.slots import Ints, Pending, Slots

if TYPE_CHECKING:
    from mcore_core.protocols import Completion, EngineContext, Request, Sampling

MOST_SLOTS = {"cpu": 256, "cuda": 512}
PROMPT_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens of prompts in one pass, where there is more than one prompt."""
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
        self.version: int | None = None
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
        with self.forward.evaluating():
            if self.lockstep:
                while any_rank(self._busy, self.device):
                    self._pass()
                    if not wait:
                        break
            else:
                while self._busy and not self._done:
                    self._pass()
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
        self.version = step
        under_way = [self._slots.progress(i) for i in range(len(self._slots))]
        self._queue.extendleft(reversed(under_way))
        self._slots = Slots()

    def sleep(self) -> None:
        """Free keys and values."""
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

    def _pass(self) -> None:
        """Run the model once: over new prompts, else over one token of each slot."""
        assert self.version is not None, "update_weights comes first"
        if new := self._admit():
            self._read(new)
        elif len(self._slots):
            self._step()
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
        budget, seen = PROMPT_TOKENS[self.device.type], set[tuple[int, ...]]()
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
        if wanted <= self._state.capacity and self._most:
            return
        capacity = max(self._state.capacity, -(-wanted // ROUND) * ROUND)
        fit = slots_that_fit(
            self.plan,
            max(self.plan.stage_layers) * (self.plan.layout.vpp or 1),
            capacity,
            self.options.native_kv_gib,
            self.device,
        )
        most = self.options.native_slots or MOST_SLOTS[self.device.type]
        self._most = max(1, min(fit, most))
        self._state.grow(self._state.slots, capacity)

    def _read(self, new: list[Pending]) -> None:
        """Read prompts, each different one once, and sample the first token of every request."""
        state = self._state
        assert state is not None
        where_N = self._slots.add(new, multiple=self.multiple)
        state.grow(len(self._slots.last), state.capacity)
        first: dict[tuple[int, ...], int] = {}
        which_N = np.array([first.setdefault(p.prompt, len(first)) for p in new])
        _, leaders = np.unique(which_N, return_index=True)
        sequences = list(first)
        row = rows.prompts(
            sequences, where_N[leaders], state, multiple=self.multiple, device=self.device
        )
        hidden_TH = self.forward.hidden(row.tokens_T, row.row)
        copies = np.setdiff1d(np.arange(len(new)), leaders)
        if len(copies):
            source = where_N[leaders[which_N[copies]]]
            state.copy(self._move(source), self._move(where_N[copies]))
        self._note_prompts(where_N)
        ends = np.cumsum([len(s) for s in sequences])[which_N] - 1
        hidden_NH = None if hidden_TH is None else hidden_TH.index_select(0, self._move(ends))
        self._continue(hidden_NH, where_N)

    def _step(self) -> None:
        """Generate one token in every slot."""
        slots, number = self._slots, len(self._slots)
        assert self._state is not None
        padded = -(-number // self.multiple) * self.multiple
        row = rows.step(slots.last[:padded], slots.position[:padded], self._state, self.device)
        hidden_TH = self.forward.hidden(row.tokens_T, row.row)
        self._continue(None if hidden_TH is None else hidden_TH[:number], np.arange(number))

    def _continue(self, hidden_NH: Tensor | None, where_N: Ints) -> None:
        """Sample the next token of some slots, and take out those that are done."""
        slots, found = self._slots, None
        if hidden_NH is not None:
            random_N = uniforms(slots.keys[where_N], slots.count[where_N])
            choice = self._choice(where_N)
            seen_NV = None
            if choice.penalty_N1 is not None and self._seen is not None:
                seen_NV = self._seen[self._move(where_N)]
            logits_NV = self.forward.logits(hidden_NH)
            tokens_N, logps_N = sample(logits_NV, self._move(random_N), choice, seen_NV)
            found = torch.stack((tokens_N.double(), logps_N.double()))
        shared = self.forward.share(found, (2, len(where_N)), self.device)
        tokens, logps = shared.cpu().numpy()
        tokens = tokens.astype(np.int64)
        if self._seen is not None:
            self._seen[self._move(where_N), self._move(tokens)] = True
        assert self.version is not None
        slots.record(where_N, tokens, logps, self.version)
        self._finish(where_N, tokens)

    def _finish(self, where_N: Ints, tokens: Ints) -> None:
        slots = self._slots
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
        self._remove(where_N[ended])

    def _remove(self, where: Ints) -> None:
        if not len(where):
            return
        source, target = self._slots.remove(where)
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
        rows_now, vocab = len(self._slots.last), self.plan.architecture.vocab_size
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
