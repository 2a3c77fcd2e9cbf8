"""Give servers the policy's weights, and again to one that was restarted.

One process does, the first rank's: a thread of it looks after the servers while the policy trains.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx

from mcore_core.failure import RunFailure
from mcore_rlhf.rollout.vllm import wire

WATCH = 1.0
"""Seconds between two looks at the servers."""
STATE_TIMEOUT = 10.0
CHUNK = 2**22

type Kind = Literal["weights", "adapter"]


class Taken(Exception):
    """Another run has given the server weights."""


@dataclass(slots=True)
class Known:
    """A server, and what was last seen of it."""

    url: str
    boot: str = ""
    away: str = ""
    """Why it could not be reached."""
    uploads: bool = False
    """It cannot read files of this machine."""


@dataclass(slots=True)
class Load:
    """What servers are to have."""

    version: int = -1
    kind: Kind = "weights"
    files: Sequence[Path] = field(default_factory=list)


class Sender:
    """Keeps servers at the policy's weights.

    Args:
        urls: Their addresses.
        owner: Names the run.
        timeout: Seconds that a server may take to answer, or to come back.
        warn: Tells the user something.
    """

    def __init__(
        self, urls: Sequence[str], *, owner: str, timeout: float, warn: Callable[[str], None]
    ) -> None:
        self.owner, self.timeout, self._warn = owner, timeout, warn
        self.servers = [Known(url) for url in dict.fromkeys(urls)]
        self.load = Load()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._client = httpx.Client(
            trust_env=False, timeout=httpx.Timeout(timeout, connect=STATE_TIMEOUT)
        )
        self._thread: threading.Thread | None = None

    def exclusive(self) -> threading.Lock:
        """Return the lock that is held while the files of `load` change."""
        return self._lock

    def give(self, load: Load) -> None:
        """Give every server new weights; the lock is held.

        A server that is away is given them when it is back, unless all are: then they are waited
        for.

        Raises:
            RunFailure: All stay away, one has other weights than it was given, or another run's.
        """
        first = self.load.version < 0
        self.load = load
        end = time.monotonic() + self.timeout
        said = False
        while True:
            for server in self.servers:
                before = server.away
                self._try(server, take=first)
                if before and not server.away:
                    self._back(server)
            away = [s for s in self.servers if s.away]
            if away and not said:
                said = True
                all_away = len(away) == len(self.servers)
                waits = f"; the run waits, {self.timeout:g} s at most" if all_away else ""
                for server in away:
                    self._warn(
                        f"the vLLM server at {server.url} is away ({server.away}): it gets the "
                        f"weights of step {load.version} when it is back{waits}"
                    )
            if len(away) < len(self.servers):
                break
            if time.monotonic() > end:
                raise RunFailure(
                    "MC844",
                    f"no vLLM server was there for {self.timeout:g} s (--vllm_server_timeout)",
                    *(f"{s.url}: {s.away}" for s in away),
                    "fix: start it with `mcore rollout`, then go on from the last checkpoint with "
                    "--load",
                )
            time.sleep(WATCH / 2)
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def check(self) -> None:
        """Raise what the thread met."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Leave the servers alone."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _try(self, server: Known, *, take: bool) -> None:
        """Give one server what it is to have, if it lacks it."""
        try:
            before = self._state(server)
            if not take and before.boot == server.boot and before.owner not in ("", self.owner):
                raise Taken
            has = (before.owner, before.version) == (self.owner, self.load.version)
            if not has:
                self._send(server)
                after = self._state(server)
                self._check(server, after)
            server.boot, server.away = before.boot, ""
        except httpx.HTTPError as error:
            server.away = f"{type(error).__name__}: {error}".rstrip(": ").partition("\n")[0]
        except Taken:
            raise RunFailure(
                "MC847",
                f"another run has given the vLLM server at {server.url} its weights",
                "fix: one run a server",
            ) from None

    def _back(self, server: Known) -> None:
        self._warn(
            f"the vLLM server at {server.url} is there again, with the weights of step "
            f"{self.load.version}"
        )

    def _check(self, server: Known, after: wire.State) -> None:
        if (after.owner, after.version) != (self.owner, self.load.version):
            raise RunFailure(
                "MC846",
                f"the vLLM server at {server.url} was given the weights of step "
                f"{self.load.version} and has those of step {after.version}",
                "its log says more",
            )

    def _state(self, server: Known) -> wire.State:
        answer = self._client.get(f"{server.url}/mcore/state", timeout=STATE_TIMEOUT)
        answer.raise_for_status()
        return wire.State.read(answer.json())

    def _send(self, server: Known) -> None:
        files = [str(file) for file in self.load.files]
        answer = None if server.uploads else self._update(server, files)
        if answer is None or answer.status_code == httpx.codes.PRECONDITION_FAILED:
            server.uploads = True
            for file in self.load.files:
                put = self._client.put(
                    f"{server.url}/mcore/files/{file.name}", content=_chunks(file)
                )
                put.raise_for_status()
            answer = self._update(server, [file.name for file in self.load.files])
        if answer.status_code != httpx.codes.OK:
            raise RunFailure(
                "MC846",
                f"the vLLM server at {server.url} did not load the weights of step "
                f"{self.load.version}",
                answer.text[:500],
                "its log says more",
            )

    def _update(self, server: Known, files: list[str]) -> httpx.Response:
        return self._client.post(
            f"{server.url}/mcore/update",
            json={
                "owner": self.owner,
                "version": self.load.version,
                "kind": self.load.kind,
                "files": files,
            },
        )

    def _watch(self) -> None:
        """Give the weights again to a server that lost them."""
        while not self._closed.wait(WATCH):
            with self._lock:
                for server in self.servers:
                    if self._closed.is_set():
                        return
                    boot, away = server.boot, server.away
                    try:
                        self._try(server, take=False)
                    except RunFailure as error:
                        self._error = error
                        return
                    if server.away and not away:
                        self._warn(f"the vLLM server at {server.url} has gone: {server.away}")
                    elif not server.away and (away or server.boot != boot):
                        self._back(server)


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while part := opened.read(CHUNK):
            yield part
