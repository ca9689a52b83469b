"""A server that a test scripts: each request's path and body in, status and body out, in threads of its own.

Its answers have the shapes of OpenAI's API with vLLM's token ids. A step is a function, so that a test may wait in it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, Any]]


class Hangup(Exception):
    """Closes the connection without an answer."""


def completion(body: dict[str, Any]) -> Reply:
    """An answer whose tokens tell which prompt it belongs to."""
    prompt = body["prompt"]
    ids = prompt if isinstance(prompt, list) else [len(prompt)]
    choices = [
        {
            "index": index,
            "text": f"answer to {prompt}",
            "finish_reason": "length",
            "token_ids": [*ids, index],
            "prompt_token_ids": ids,
        }
        for index in range(body.get("n", 1))
    ]
    return 200, {"choices": choices, "usage": {"prompt_tokens_details": {"cached_tokens": 3}}}


def chat(body: dict[str, Any]) -> Reply:
    message = {"role": "assistant", "content": "answer to " + body["messages"][-1]["content"]}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "token_ids": [7]}
    return 200, {"choices": [choice], "prompt_token_ids": [1, 2]}


def failure(status: int, message: str) -> Reply:
    return status, {"error": {"message": message, "type": "invalid_request_error"}}


class FakeServer:
    """What it was asked, in the order of arrival, and how many requests it had at once."""

    def __init__(self) -> None:
        self.answers: dict[str, Callable[[dict[str, Any]], Reply]] = {
            "/v1/completions": completion,
            "/v1/chat/completions": chat,
        }
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self.url = ""
        self._now = 0
        self._lock = threading.Lock()

    def get(self, path: str) -> Reply:
        if path == "/v1/models":
            return 200, {"data": [{"id": "fake", "max_model_len": 100}, {"id": "second", "max_model_len": 50}]}
        return (200, {}) if path == "/live" else (404, {})

    def post(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            return self.answers[path](body)
        finally:
            with self._lock:
                self._now -= 1


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            try:
                self._reply(*fake.get(self.path))
            except Hangup:
                self.close_connection = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                self._reply(*fake.post(self.path, body, dict(self.headers)))
            except Hangup:
                self.close_connection = True

        def _reply(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that has gone is no error here."""

    with Server(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()
