"""A stand-in for a chat endpoint on this machine: OpenAI's /chat/completions, answered by a function of the test."""

from __future__ import annotations

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Asked(NamedTuple):
    """A request as it came in."""

    key: str | None  # the Authorization header
    model: str
    system: str
    user: str  # the last message
    messages: list[dict]
    temperature: float | None

    @property
    def kind(self) -> str:
        return "describe" if "<<" in self.system else "detect" if self.system else "probe"

    @property
    def texts(self) -> list[str]:
        """The texts of a request, marked or not."""
        return [
            json.loads(text) for text in re.findall(r'^\d+\. (?:\(strength \d+\) )?(".*")$', self.messages[1]["content"], re.M)
        ]


@contextmanager
def serve(answer):
    """The address of a running endpoint and the list of what it was asked.

    answer: Asked -> the text to answer, or (status, headers, body); may raise to close the connection, or sleep.
    """
    asked: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            said = body["messages"]
            system = said[0]["content"] if said[0]["role"] == "system" else ""
            one = Asked(
                self.headers.get("Authorization"), body["model"], system, said[-1]["content"], said, body.get("temperature")
            )
            asked.append(one)
            answered = answer(one)
            status, headers, content = answered if isinstance(answered, tuple) else (200, {}, completion(answered))
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json", "Content-Length": len(content)} | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.handle_error = True, lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def completion(text: str) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": {"total_tokens": 7}}
