"""An endpoint on 127.0.0.1 that speaks ``/v1/chat/completions``, well or badly, as it is told."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# (status, headers, body): the body as bytes is sent as it is, None closes the connection half-way.
Reply = tuple[int, dict[str, str], Any]


def completion(text: str | None, **fields: Any) -> Reply:
    """A well-formed answer."""
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "fake",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        **fields,
    }
    return 200, {}, body


class Endpoint:
    """What a test asks of the server: its address, what it was sent, and how many requests overlapped."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Reply]) -> None:
        self.answer = answer
        self.received: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.url = ""

    def questions(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.received]


@contextmanager
def serve(answer: Callable[[dict[str, Any], int], Reply]) -> Iterator[Endpoint]:
    """A server whose replies are ``answer(request, n)``, n counting earlier requests with the same messages."""
    endpoint = Endpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body are two writes: the second would wait 40 ms for the client to acknowledge the first.
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with endpoint.lock:
                earlier = sum(other["messages"] == body["messages"] for other in endpoint.received)
                endpoint.received.append(body)
                endpoint.times.append(time.monotonic())
                endpoint.keys.append(self.headers.get("Authorization"))
                endpoint.paths.append(self.path)
                endpoint.now += 1
                endpoint.most = max(endpoint.most, endpoint.now)
            try:
                if self.path.split("?")[0] != "/v1/chat/completions":
                    reply: Reply = (404, {}, {"error": {"message": f"no {self.path}"}})
                else:
                    reply = endpoint.answer(body, earlier)
            finally:
                with endpoint.lock:
                    endpoint.now -= 1
            status, headers, content = reply
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            # A reply of None promises more than it sends.
            self.send_header("Content-Length", str(len(data) + 100 * (content is None)))
            self.end_headers()
            self.wfile.write(data)
            if content is None:
                self.close_connection = True

        def log_message(self, *_args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            # A client may hang up, as one does that was interrupted.
            if not isinstance(sys.exc_info()[1], ConnectionError):
                super().handle_error(request, client_address)

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
