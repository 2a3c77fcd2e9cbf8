"""wandb and swanlab, the real packages: offline, without a key, with a server that goes away."""

import contextlib
import gzip
import json
import math
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from commands import metrics

KEY = "0123456789012345678901234567890123456789"
CLEAN = {
    "WANDB_MODE": "", "WANDB_API_KEY": "", "WANDB_BASE_URL": "", "NETRC": os.devnull,
    "SWANLAB_API_KEY": "", "SWANLAB_MODE": "", "WANDB_INIT_TIMEOUT": "4",
}  # fmt: skip
BUCKET = {
    "id": "x", "name": "r1", "displayName": "n", "description": "", "config": "{}",
    "sweepName": None, "historyLineCount": 0,
    "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}},
}  # fmt: skip


def environment(home, **more):
    """Variables without a key; empty ones are removed."""
    values = {**CLEAN, "HOME": str(home), "SWANLAB_SAVE_DIR": str(home), **more}
    gone = [k for k, v in values.items() if not v]

    def before():
        for name in gone:
            os.environ.pop(name, None)

    return {"env": {k: v for k, v in values.items() if v}, "before": before}


class Server:
    """Answers wandb's calls until it has opened a run; then it drops every connection."""

    def __init__(self):
        self.alive, owner = True, self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if not owner.alive:
                    self.connection.close()
                    return
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                text = body.decode(errors="replace")
                self.answer(owner.take(text))
                owner.alive = "upsertBucket" not in text

            do_GET = do_PUT = do_POST

            def answer(self, value):
                data = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.http.server_port}"

    def take(self, text):
        if "upsertBucket" in text:
            return {"data": {"upsertBucket": {"bucket": BUCKET, "inserted": True}}}
        viewer = {"id": "v", "username": "u", "entity": "e", "flags": "{}", "teams": {"edges": []}}
        return {"data": {"viewer": viewer, "serverInfo": None}}

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server():
    found = Server()
    yield found
    found.close()


@pytest.fixture
def train(mcore, sft, dataset, tmp_path):
    def run(*more, iters=4, data=dataset, **environ):
        return mcore(
            *(data if a == dataset else a for a in sft), "--train_iters", iters,
            "--log_interval", 2, "--add_version", "false", "--save", tmp_path / "run", *more,
            **environment(tmp_path, **environ),
        )  # fmt: skip

    return run


def log_records(data):
    """The records of a LevelDB log: blocks of 32 KiB, each record with a header of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def recorded(folder):
    """The metrics of an offline wandb run, by step."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    steps = {}
    for data in log_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            steps[record.history.step.num] = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
    return steps, file


def test_both_offline_with_every_option(train, dataset, tmp_path):
    """Also the curves of channels, which every reporter has."""
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    channels = tmp_path / "channels.jsonl"
    named = (row | {"kind": ("short", "long")[i % 2]} for i, row in enumerate(rows))
    channels.write_text("".join(json.dumps(row) + "\n" for row in named))
    ran = train(
        "--enable_channel_loss", "true", "--columns", '{"kind": "channel"}',
        "--report_to", "wandb", "swanlab", "tensorboard", "jsonl",
        "--wandb_project", "letters", "--wandb_exp_name", "first", "--wandb_save_dir",
        tmp_path / "trackers", "--val_dataset", f"{channels}#16", "--eval_interval", 4,
        "--log_params_norm", "true", "--log_throughput", "true",
        data=channels, WANDB_MODE="offline", SWANLAB_MODE="offline",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "warning" not in ran.err
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    evaluation = next(line for line in metrics(tmp_path / "run") if "eval/loss" in line)
    assert math.isclose(
        evaluation["eval/perplexity"], math.exp(evaluation["eval/loss"]), rel_tol=1e-6
    )
    steps, file = recorded(tmp_path / "trackers")
    assert b"letters" in file.read_bytes()
    assert b"first" in file.read_bytes()
    for step in (2, 4):
        pair = [line for line in lines if line["step"] in (step - 1, step)]
        mean = sum(line["loss"] for line in pair) / 2
        assert math.isclose(steps[step]["loss"], mean, rel_tol=1e-6)
        assert math.isclose(steps[step]["lr"], pair[1]["lr"], rel_tol=1e-6)
        for name in ("loss/short", "loss/long"):
            have = [line[name] for line in pair if name in line]
            assert math.isclose(steps[step][name], sum(have) / len(have), rel_tol=1e-6)
        assert {"params_norm", "tflops_per_device", "tokens_per_second"} <= steps[step].keys()
    for name in ("perplexity", "loss/short", "loss/long"):
        assert math.isclose(steps[4][f"eval/{name}"], evaluation[f"eval/{name}"], rel_tol=1e-6)
    (swan,) = (tmp_path / "trackers/swanlab").glob("run-*")
    assert "global_batch_size" in (swan / "files/config.yaml").read_text()
    (data,) = swan.glob("run-*.swanlab")
    names = (b"grad_norm", b"params_norm", b"first", b"loss/short", b"eval/loss/long")
    assert all(name in data.read_bytes() for name in names)
    (board,) = (tmp_path / "run/runs").iterdir()
    assert all(name in board.read_bytes() for name in (b"loss/short", b"eval/loss/long"))
    assert "loss/short" in (tmp_path / "run/report.html").read_text()
    assert f"wandb sync {file.parent}" in ran.err.replace("\n", "")
    assert f"swanlab sync {swan}" in ran.err.replace("\n", "")
    assert "swanlab" not in ran.out


def test_without_a_key_the_run_is_recorded_offline(train, tmp_path):
    ran = train("--report_to", "wandb", "swanlab")
    assert ran.code == 0, ran.err
    assert "warning: wandb: No API key configured" in ran.err
    assert "warning: swanlab: " in ran.err
    assert ran.err.count("this run is recorded offline") == 2
    steps, _ = recorded(tmp_path / "run")
    assert sorted(steps) == [2, 4]


@pytest.mark.slow
def test_a_server_that_is_not_there(train, tmp_path):
    ran = train("--report_to", "wandb", WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=KEY)
    assert ran.code == 0, ran.err
    assert "connection refused; this run is recorded offline" in ran.err
    assert sorted(recorded(tmp_path / "run")[0]) == [2, 4]


def test_a_server_that_goes_away(train, server, tmp_path):
    """The connection is cut once the run is open: every step is still taken."""
    ran = train(
        "--report_to", "wandb", iters=60, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY,
        WANDB_FINISH_TIMEOUT="4",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert len([line for line in metrics(tmp_path / "run") if "loss" in line]) == 60
    assert not server.alive
    assert "warning: wandb: TimeoutError: not everything could be sent; `wandb sync " in ran.err
    assert (tmp_path / "run/checkpoint-60/training.json").exists()


def test_a_folder_that_cannot_be_written(train, tmp_path):
    (tmp_path / "file").write_text("")
    ran = train(
        "--report_to", "wandb", "swanlab", "--wandb_save_dir", tmp_path / "file/below",
        "--tensorboard_dir", tmp_path / "file", WANDB_MODE="offline", SWANLAB_MODE="offline",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    for sink in ("wandb", "swanlab", "tensorboard"):
        assert f"warning: {sink}: " in ran.err
    assert len(metrics(tmp_path / "run")) == 4
