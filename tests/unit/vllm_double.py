"""A server that speaks as the recorded one did: tests/data/vllm_protocol.json.

`python vllm_double.py PORT` runs it by itself, for runs in processes of their own.
"""

import json
import socket
import sys
import threading
import uuid
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

RECORDED = json.loads(
    (Path(__file__).parents[1] / "data" / "vllm_protocol.json").read_text(encoding="utf-8")
)
LINE = RECORDED["generate_cancelled"]["lines"][0]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.double._sockets.append(self.connection)
        known = self.path == "/mcore/state"
        self.reply(200 if known else 404, self.double.state if known else {})

    def do_PUT(self):
        self.double.files[self.path.rpartition("/")[2]] = len(self.body())
        self.reply(RECORDED["file"]["status"], RECORDED["file"]["answer"])

    def do_POST(self):
        self.double._sockets.append(self.connection)
        asked = json.loads(self.body())
        self.double.log.append((self.path.rpartition("/")[2], asked))
        match self.path:
            case "/mcore/update":
                self.reply(*self.double.update(asked))
            case "/mcore/cancel":
                self.double.cancelled |= set(asked["ids"])
                self.reply(200, {})
            case "/mcore/generate":
                self.generate(asked)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def reply(self, status, answer):
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def generate(self, asked):
        now = {"owner": self.double.state["owner"], "version": self.double.state["version"]}
        if now != {key: asked[key] for key in now}:
            self.reply(RECORDED["generate_other_version"]["status"], now)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for request in asked["requests"]:
            while not self.double.hold.wait(0.02) and request["id"] not in self.double.cancelled:
                pass
            line = json.dumps(self.double.line(request)).encode() + b"\n"
            self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args):
        pass


class Double:
    """Writes tokens that depend on prompt and seed; `hold` keeps answers back until it is set."""

    def __init__(self, port=0, **changes):
        self.state = {**RECORDED["state_at_start"], "boot": uuid.uuid4().hex, **changes}
        self.log, self.bodies, self.files, self.cancelled = [], [], {}, set()
        self.hold = threading.Event()
        self.hold.set()
        self.readable = True
        self.error = ""
        self._sockets = []
        self._server = Server(("127.0.0.1", port), type("Bound", (Handler,), {"double": self}))
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def update(self, asked):
        if any(Path(f).is_absolute() for f in asked["files"]) and not self.readable:
            recorded = RECORDED["update_unreadable"]
            return recorded["status"], recorded["answer"]
        if self.error:
            return 500, {"error": self.error}
        self.state |= {"owner": asked["owner"], "version": asked["version"]}
        return 200, {**RECORDED["update"]["answer"], "version": asked["version"]}

    def line(self, request):
        self.bodies.append(request)
        sampling = request["sampling"]
        key = zlib.crc32(f"{request['prompt']}{sampling['seed']}".encode())
        number = 1 + key % sampling["max_tokens"]
        stopped = bool(sampling["stop_token_ids"]) and number < sampling["max_tokens"]
        tokens = [3 + (key >> i) % 20 for i in range(number)]
        if stopped:
            tokens[-1] = sampling["stop_token_ids"][0]
        cancelled = request["id"] in self.cancelled
        found = {
            "id": request["id"],
            "tokens": [] if cancelled else tokens,
            "logps": [] if cancelled else [-0.5 - i / 64 for i in range(number)],
            "versions": [] if cancelled else [[self.state["version"], number]],
            "stop": "cancelled" if cancelled else "stop" if stopped else "length",
        }
        assert found.keys() == LINE.keys()
        return found

    def die(self):
        """Go away as a killed process does."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._sockets:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


if __name__ == "__main__":
    port, vocab_size = map(int, sys.argv[1:])
    Double(port, vocab_size=vocab_size)
    threading.Event().wait()
