"""A chat endpoint that speaks OpenAI's protocol: requests that wait and try again, and answers that are paid for once.

The key comes from the environment and goes nowhere but into the header of a request.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from pathlib import Path
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from run.machine import first_line

KEY = "OPENAI_API_KEY"  # the environment variable; without it requests carry no key, as local servers need none
TIMEOUT = 120  # seconds for an answer
WAIT, LONGEST_WAIT = 1.0, 60  # seconds before a request is sent again: 0, 2, 4, 8 and 16 times the first, at random a bit more
BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # answers that may be another one later
THREADS = 8  # requests under way
GIVE_UP = 3  # requests in a row that stayed without an answer: the rest is not asked
AGAIN = "That was not the JSON asked for. Answer again, with the JSON object alone."


class Unanswered(Exception):
    """A request without a usable answer; the message says why in one line."""


class Endpoint:
    """A chat endpoint, with the answers that it gave before."""

    def __init__(self, url: str, model: str, cache: Path, timeout: float = TIMEOUT, wait: float = WAIT):
        self.url = f"{url.rstrip('/').removesuffix('/chat/completions')}/chat/completions"
        self.model, self.cache, self.timeout, self.wait = model, cache, timeout, wait
        self.known = read_cache(cache)
        self.options: dict = {"temperature": 0}
        self.key = os.environ.get(KEY, "").strip()
        self.lock, self.failed, self.requests, self.tokens = threading.Lock(), 0, 0, 0
        self.session = requests.Session()
        self.session.auth = self.sign  # a header alone would give way to a ~/.netrc

    def be_patient(self, **tries: int) -> None:
        """How often a request is sent again, at 429, 5xx and silence; see urllib3's Retry."""
        again = Retry(
            **tries, redirect=0, status_forcelist=BUSY, allowed_methods=None, raise_on_status=False, backoff_factor=self.wait,
            backoff_jitter=self.wait, backoff_max=LONGEST_WAIT, retry_after_max=LONGEST_WAIT,
        )  # fmt: skip
        self.session.mount(self.url, HTTPAdapter(pool_maxsize=THREADS, max_retries=again))

    def probe(self) -> None:
        """ValueError, one line that names the flag, if the endpoint cannot be used. Costs one short request."""
        if not self.key.isascii() or not self.key.isprintable() or " " in self.key:
            raise ValueError(f"{KEY}: holds characters that no key has; set it again")
        self.be_patient(total=2, connect=0, read=0)
        try:
            if not self.send([{"role": "user", "content": 'Answer with this JSON alone: {"ready": 1}'}]):
                raise Unanswered("its answer holds no text at choices[0].message.content")
        except Unanswered as error:
            raise ValueError(f"--label-url {self.url.removesuffix('/chat/completions')}: {error}") from None
        self.be_patient(total=5, read=2)

    def ask(self, messages: list[dict], read) -> object:
        """What `read` makes of the answer, an earlier one where there is one. read: text -> value, ValueError if it has none.

        Unanswered where three answers could not be read, or none came.
        """
        if (value := self.recall(messages, read)) is not None:
            return value
        said = list(messages)
        for _ in range(3):
            answer = self.send(said)
            try:
                value = read(answer)
            except ValueError:
                said = [*messages, {"role": "assistant", "content": answer[:2000] or "?"}, {"role": "user", "content": AGAIN}]
                continue
            with self.lock, self.cache.open("a", encoding="utf-8") as file:
                self.known[self.key_of(messages)] = answer
                line = json.dumps({"key": self.key_of(messages), "model": self.model, "answer": answer})
                file.write(f"\n{line}")  # on a line of its own, also after one that was cut off
            return value
        raise Unanswered("three answers were not the JSON asked for")

    def recall(self, messages: list[dict], read) -> object | None:
        """What `read` makes of an earlier answer, None where there is none that it can read."""
        try:
            return read(self.known[self.key_of(messages)])
        except (KeyError, ValueError):
            return None

    def key_of(self, messages: list[dict]) -> str:
        return hashlib.sha256(json.dumps([self.model, messages]).encode()).hexdigest()

    def send(self, messages: list[dict]) -> str:
        """The text of the answer, empty if it holds none. Unanswered if none comes, after waiting and trying again."""
        if self.failed >= GIVE_UP:
            raise Unanswered("it had stopped answering")
        body = {"model": self.model, "messages": messages} | self.options
        try:
            response = self.session.post(self.url, json=body, timeout=(10, self.timeout), allow_redirects=False)
        except requests.RequestException as error:
            self.failed += 1
            cause = str(error).rpartition(": ")[2].strip("'\")")  # the innermost of several
            raise Unanswered(f"does not answer ({self.hidden(cause)})") from None
        status = response.status_code
        if status == 400 and "temperature" in response.text and self.options:
            self.options = {}  # a model that takes none but its own
            return self.send(messages)
        if status != 200:
            self.failed += GIVE_UP if status in (401, 403) else status in BUSY
            raise Unanswered(self.fault(response))
        self.failed = 0
        return self.read_answer(response)

    def sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def read_answer(self, response: requests.Response) -> str:
        try:
            said = response.json()
            with self.lock:
                self.requests += 1
                self.tokens += int((said.get("usage") or {}).get("total_tokens") or 0)
            content = said["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return ""
        return content if isinstance(content, str) else ""

    def fault(self, response: requests.Response) -> str:
        """What a refusal says, in one line without the key."""
        status = response.status_code
        if status in (401, 403):
            return f"refuses {'the key in ' + KEY if self.key else f'requests without a key; set {KEY}'} (status {status})"
        try:
            said = response.json()["error"]
            said = said["message"] if isinstance(said, dict) else said
        except (ValueError, KeyError, TypeError):
            said = None
        return f"answers with status {status} ({self.hidden(first_line(ValueError(said or response.reason or 'no reason')))})"

    def hidden(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


def read_cache(path: Path) -> dict[str, str]:
    """{key: answer} of earlier runs; a line that was cut off when one was killed is passed over."""
    known = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            one = json.loads(line)
            known[one["key"]] = one["answer"]
        except (ValueError, KeyError, TypeError):
            continue
    return known


def found_json(text: str) -> object:
    """The last JSON object in an answer, or list where there is none, whatever stands around it. ValueError without any."""
    text, at, values, decoder = text.rpartition("</think>")[2], 0, [], json.JSONDecoder()
    while begin := re.compile(r"[{\[]").search(text, at):
        try:
            value, at = decoder.raw_decode(text, begin.start())
            values.append(value)
        except RecursionError:
            break
        except ValueError:
            at = begin.end()
    if not values:
        raise ValueError("no JSON")
    return next((value for value in reversed(values) if isinstance(value, dict)), values[-1])


def check(url: str | None, model: str | None) -> None:
    """ValueError for flags that do not go together, before anything is opened."""
    if bool(url) != bool(model):
        given, missing = ("url", "model") if url else ("model", "url")
        raise ValueError(f"--label-{given} is given without --label-{missing}")
    if url:
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query:
            raise ValueError(f"--label-url: must not hold a key, which files would repeat; set it in {KEY}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--label-url {url}: must begin with http:// or https://, e.g. https://api.openai.com/v1")
