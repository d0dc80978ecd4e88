"""A server on loopback that answers as it is told to, rightly or wrongly."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Server:
    """Answers `answer(path, body)` as JSON; the n-th request meets the n-th of `faults`, and those after them none.

    A fault is a status, one of slow, drip, half, garbage, deep, huge, redirect, or a function that changes the answer.
    """

    def __init__(self, answer):
        self.answer, self.faults, self.seen, self.tokens, self.port = answer, [], [], [], 0
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        """Begins to listen, after `stop` on the same port."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.seen.append(body)
                    outer.tokens.append(self.headers.get("Authorization"))
                    fault = outer.faults.pop(0) if outer.faults else None
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has gone, as it should
                    self.reply(body, fault)

            def reply(self, body, fault):
                status, answer = 200, outer.answer(self.path, body)
                if callable(fault):
                    answer = fault(answer)
                text = json.dumps(answer).encode()
                length = None
                if isinstance(fault, int):
                    status, text = fault, b'{"error": "told to"}'
                elif fault == "slow":
                    time.sleep(1.5)
                elif fault == "half":
                    length, text = len(text), text[: len(text) // 2]
                elif fault == "garbage":
                    text = b"<html>hello</html>"
                elif fault == "deep":
                    text = b"[" * 200_000
                elif fault == "huge":
                    text = b"[" + b"1," * 40_000 + b"1]"
                self.send_response(302 if fault == "redirect" else status)
                if fault == "redirect":
                    self.send_header("Location", f"{outer.url}/elsewhere")
                self.send_header("Content-Length", str(length or len(text)))
                self.end_headers()
                if fault == "drip":
                    for byte in text:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        time.sleep(0.1)
                self.wfile.write(text)
                self.close_connection = fault == "half"

        class Quiet(ThreadingHTTPServer):
            daemon_threads, block_on_close = True, False

            def shutdown_request(self, request):
                with outer.lock:
                    outer.connections.discard(request)
                super().shutdown_request(request)

            def process_request(self, request, address):
                with outer.lock:
                    outer.connections.add(request)
                super().process_request(request, address)

        self.lock, self.connections = threading.Lock(), set()
        self.http = Quiet(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        """Stops listening and cuts every connection."""
        self.http.shutdown()
        self.http.server_close()
        with self.lock:
            open_ones = list(self.connections)
        for connection in open_ones:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def serve():
    """Starts a `Server`; all are stopped in the end."""
    servers = []

    def start(answer):
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
