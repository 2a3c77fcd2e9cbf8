"""The client of vLLM servers, against answers that a real one gave and against one that dies."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from mcore_rlhf.rollout.vllm import fleet as fleets
from mcore_rlhf.rollout.vllm import send, wire
from mcore_rlhf.rollout.vllm.fleet import Fleet, Policy, connect
from mcore_rlhf.rollout.vllm.send import Load, Sender
from vllm_double import RECORDED, Double

from mcore_core.errors import UsageError
from mcore_core.failure import RunFailure
from mcore_core.protocols import Request, Sampling


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(fleets, "PAUSE", 0.05)
    monkeypatch.setattr(send, "WATCH", 0.05)


@pytest.fixture
def doubles():
    made = []

    def make(*args, **changes):
        made.append(Double(*args, **changes))
        return made[-1]

    yield make
    for double in made:
        double.hold.set()
        double.die()


@pytest.fixture
def closing():
    opened = []
    yield lambda item: opened.append(item) or item
    for item in opened:
        item.close()


ASKED = RECORDED["generate"]["request"]["requests"]


def sampling(**changes):
    return Sampling(**{"max_tokens": 6, "stop_token_ids": (2,), "seed": 7, **changes})


def requests(number, start=0, **changes):
    return [
        Request(f"t0-{i}-0", (504, 3575, i), sampling(**changes), {"n": i, "path": Path("x")})
        for i in range(start, start + number)
    ]


def connected(closing, *servers, version=0, timeout=5.0, **options):
    """A fleet and a sender whose servers have the weights of a version."""
    urls, said = [s.url for s in servers], []
    policy = Policy("run-a")
    fleet = closing(
        Fleet(urls, timeout=timeout, policy=policy, decode=str, warn=said.append, **options)
    )
    sender = closing(Sender(urls, owner="run-a", timeout=timeout, warn=said.append))
    with sender.exclusive():
        sender.give(Load(version, "weights", []))
    policy.version = version
    return fleet, sender, said


def collect(fleet, number):
    found = {}
    while len(found) < number:
        found |= {c.id: c for c in fleet.collect(wait=True)}
    return found


# -- the recorded format ---------------------------------------------------------------------------


def test_recorded_lines_are_completions():
    lines = [*RECORDED["generate"]["lines"], *RECORDED["generate_over_an_update"]["lines"]]
    lines += RECORDED["generate_cancelled"]["lines"]
    read = {}
    for line in lines:
        if "error" not in line:
            request = Request(line["id"], (504, 3575, 282), sampling(max_tokens=300))
            read[line["id"]] = wire.completion(line, request, str)
    assert read["t0-1-0"].stop == "stop" and read["t0-1-0"].logps.dtype == np.float32
    assert read["t1-0-0"].stop == "cancelled" and len(read["t1-0-0"].token_ids) == 19
    over = read["t2-0-0"]
    assert over.versions.tolist() == [0] * 17 + [1] * 103 and over.stop == "length"
    assert all(len(c.token_ids) == len(c.logps) == len(c.versions) for c in read.values())
    assert wire.State.read(RECORDED["state_at_start"]).version == -1


def test_requests_have_the_recorded_form():
    for with_row, recorded in zip(
        (False, True), RECORDED["generate"]["request"]["requests"], strict=True
    ):
        mine = wire.asked(requests(1)[0], with_row=with_row)
        assert mine.keys() == recorded.keys()
        assert mine["sampling"].keys() == recorded["sampling"].keys()
        for name, value in recorded["sampling"].items():
            assert type(mine["sampling"][name]) is type(value), name


def test_a_line_whose_parts_differ_in_length_is_refused():
    line = {**RECORDED["generate_cancelled"]["lines"][0]}
    line["logps"] = line["logps"][:-1]
    with pytest.raises(ValueError, match="19 tokens, 18 log-probabilities"):
        wire.completion(line, requests(1)[0], str)


def test_a_stop_string_across_new_weights_is_found():
    text = {1: "a", 2: "ST", 3: "OP", 4: "b"}
    line = {
        "tokens": [1, 2, 3, 4],
        "logps": [-1.0] * 4,
        "versions": [[0, 2], [1, 2]],
        "stop": "length",
    }
    request = Request("x", (5,), sampling(stop=("STOP",)))
    found = wire.completion(line, request, lambda ids: "".join(text[i] for i in ids))
    assert found.token_ids == (1, 2, 3) and found.stop == "stop"
    assert found.versions.tolist() == [0, 0, 1]


def test_seeds_are_of_the_run_and_the_request():
    assert len({wire.seed_of(s, k) for s in range(9) for k in "abc"}) == 27


# -- servers ---------------------------------------------------------------------------------------


def test_servers_share_a_batch_and_rows_go_along(doubles, closing):
    servers = [doubles(), doubles()]
    fleet, _, said = connected(closing, *servers, with_rows=True)
    fleet.submit(requests(10))
    found = collect(fleet, 10)
    assert set(found) == {r.id for r in requests(10)}
    assert [len(s.bodies) for s in servers] == [5, 5]
    assert servers[0].bodies[0]["row"]["path"] == "x"
    assert said == []


def test_a_request_without_room_needs_no_server(doubles, closing):
    fleet, _, _ = connected(closing, doubles())
    fleet.submit(requests(1, max_tokens=0))
    (done,) = fleet.collect(wait=True)
    assert done.stop == "length" and done.token_ids == ()


def test_what_a_dead_server_had_goes_to_another(doubles, closing):
    first, second = doubles(), doubles()
    fleet, _, said = connected(closing, first, second)
    first.hold.clear()
    fleet.submit(requests(8))
    while not any(kind == "generate" for kind, _ in first.log):
        time.sleep(0.01)
    first.die()
    assert len(collect(fleet, 8)) == 8
    assert len(second.bodies) == 8
    assert any("another server has them now" in text for text in said)


def test_a_restarted_server_gets_the_weights_again_and_answers(doubles, closing):
    """Nothing is answered with the weights of its start."""
    server = doubles()
    fleet, _, said = connected(closing, server, version=3)
    server.hold.clear()
    fleet.submit(requests(4))
    while not any(kind == "generate" for kind, _ in server.log):
        time.sleep(0.01)
    server.die()
    time.sleep(0.2)
    again = doubles(server.port)
    found = collect(fleet, 4)
    assert all(set(c.versions.tolist()) == {3} for c in found.values())
    assert [asked["version"] for kind, asked in again.log if kind == "update"] == [3]
    assert any("they wait until it is there again" in text for text in said)
    deadline = time.monotonic() + 5
    while not any("there again, with the weights of step 3" in text for text in said):
        assert time.monotonic() < deadline, said
        time.sleep(0.02)


def test_new_weights_wait_for_a_server_that_is_away(doubles, closing):
    server = doubles()
    _, sender, said = connected(closing, server)
    server.die()
    back = []
    threading.Timer(0.4, lambda: back.append(doubles(server.port))).start()
    with sender.exclusive():
        sender.give(Load(1, "weights", []))
    assert back[0].state["version"] == 1
    assert any("the run waits, 5 s at most" in text for text in said)


def test_a_server_that_stays_away_ends_the_run(doubles, closing):
    server = doubles()
    fleet, sender, _ = connected(closing, server, timeout=0.4)
    server.die()
    fleet.submit(requests(2))
    with pytest.raises(RunFailure, match=r"no vLLM server was there for 0\.4 s") as failed:
        fleet.collect(wait=True)
    assert failed.value.problem.code == "MC844"
    with pytest.raises(RunFailure, match="no vLLM server"), sender.exclusive():
        sender.give(Load(1, "weights", []))


def test_requests_can_be_cancelled(doubles, closing):
    server = doubles()
    fleet, _, _ = connected(closing, server)
    server.hold.clear()
    fleet.submit(requests(3))
    while not any(kind == "generate" for kind, _ in server.log):
        time.sleep(0.01)
    fleet.cancel(["t0-0-0", "t0-2-0"])
    time.sleep(0.2)
    server.hold.set()
    found = collect(fleet, 3)
    assert [found[f"t0-{i}-0"].stop == "cancelled" for i in range(3)] == [True, False, True]


def test_a_request_that_vllm_refuses_names_itself(doubles, closing):
    server = doubles()
    fleet, _, _ = connected(closing, server)
    (recorded,) = [line for line in RECORDED["generate"]["lines"] if "error" in line]
    server.line = lambda request: {**recorded, "id": request["id"]}
    fleet.submit(requests(1))
    with pytest.raises(RunFailure, match="cannot generate request t0-0-0"):
        fleet.collect(wait=True)


# -- weights ---------------------------------------------------------------------------------------


def test_files_that_a_server_cannot_read_are_sent(doubles, closing, tmp_path):
    server = doubles()
    server.readable = False
    files = [tmp_path / f"part-{i:05}.safetensors" for i in range(2)]
    for i, file in enumerate(files):
        file.write_bytes(b"x" * (5_000_000 + i))
    sender = closing(Sender([server.url], owner="run-a", timeout=5, warn=print))
    with sender.exclusive():
        sender.give(Load(2, "weights", files))
    assert server.files == {file.name: 5_000_000 + i for i, file in enumerate(files)}
    assert server.log[-1][1]["files"] == [file.name for file in files]
    assert server.state["version"] == 2


def test_a_server_that_does_not_load_the_weights_ends_the_run(doubles, closing):
    server = doubles()
    server.error = "RuntimeError: weights that were not sent: model.norm.weight"
    with pytest.raises(RunFailure, match="did not load the weights of step 0") as failed:
        connected(closing, server)
    assert "model.norm.weight" in str(failed.value)


def test_a_server_that_says_yes_and_has_other_weights_ends_the_run(doubles, closing):
    server = doubles()
    server.update = lambda asked: (200, {**RECORDED["update"]["answer"]})
    with pytest.raises(RunFailure, match="has those of step -1"):
        connected(closing, server)


def test_two_runs_do_not_share_a_server(doubles, closing):
    server = doubles()
    _, sender, _ = connected(closing, server)
    other = closing(Sender([server.url], owner="run-b", timeout=5, warn=print))
    with other.exclusive():
        other.give(Load(0, "weights", []))
    deadline = time.monotonic() + 5
    with pytest.raises(RunFailure, match="another run has given"):
        while time.monotonic() < deadline:
            sender.check()
            time.sleep(0.02)


# -- the start -------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_named(doubles):
    server = doubles()
    assert connect([server.url], 1.0)[0].vllm == "0.32.0"
    server.die()
    other = doubles()
    with pytest.raises(UsageError, match=rf"no vLLM server answers at {server.url} within 0\.1 s"):
        connect([other.url, server.url], 0.1)


def test_a_plain_vllm_server_is_refused_at_once(doubles):
    server = doubles()
    server.state = {"object": "list"}
    begin = time.monotonic()
    with pytest.raises(UsageError, match="takes no weights of a training run"):
        connect([server.url], 30.0)
    assert time.monotonic() - begin < 5
