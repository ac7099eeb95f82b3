"""A stand-in for the Hub on this machine: the HTTP that huggingface_hub and datasets speak when they push and load.

Files live in memory, every commit is on `main`; one that was asked for stays readable. Large files go through the LFS batch
protocol (HF_HUB_DISABLE_XET=1).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@contextmanager
def serve(token: str = "hf_test"):
    """The address of a running server, its repositories {"models/user/name": {path: content}}, a context in which it is off."""
    repositories = {}
    handler = type("Handler", (Hub,), {"repositories": repositories, "uploads": {}, "commits": {}, "token": token})

    @contextmanager
    def answering(port: int):
        with ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            yield server.server_port
            server.shutdown()
            thread.join()

    with ExitStack() as stack:
        port = stack.enter_context(answering(0))

        @contextmanager
        def off():
            stack.close()
            yield
            stack.enter_context(answering(port))

        yield f"http://127.0.0.1:{port}", repositories, off


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, body=b"", **headers) -> None:
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"} | headers
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes] | None:
        files = self.commits.get(revision, self.repositories.get(repository))
        if files is None:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return files

    def commit(self, files: dict) -> str:
        return hashlib.sha1(
            "".join(f"{p} {hashlib.sha1(c).hexdigest()}" for p, c in sorted(files.items())).encode()
        ).hexdigest()

    def entry(self, path: str, content: bytes) -> dict:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    # --- writing

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self.body()
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.endswith("/paths-info/main") or "/paths-info/" in path:
            kind, name, revision = re.match(r"/api/(models|datasets)/(.+)/paths-info/([^/]+)", path).groups()
            if (files := self.files(f"{kind}/{name}", revision)) is None:
                return None
            asked = parse_qs(body.decode()).get("paths", []) if body[:1] != b"{" else json.loads(body)["paths"]
            found = [self.entry(p, files[p]) for p in asked if p in files]
            found += [
                {"type": "directory", "path": p, "oid": "0" * 40} for p in asked if any(f.startswith(f"{p}/") for f in files)
            ]
            return self.answer(200, found)
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked.get('type') or 'model'}s/{asked['organization']}/{asked['name']}"
            known = repository in self.repositories
            self.repositories.setdefault(repository, {})
            return self.answer(
                409 if known else 200, {"url": f"http://{self.headers['Host']}/{repository.removeprefix('models/')}"}
            )
        if found := re.match(r"/api/(models|datasets)/(.+)/preupload/", path):
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular" if f["size"] < 20_000 else "lfs", "shouldIgnore": False}
                for f in files
            ]
            return self.answer(200, {"files": modes})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"http://{self.headers['Host']}/upload/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        kind, name = re.match(r"/api/(models|datasets)/(.+)/commit/main", path).groups()
        if (files := self.files(f"{kind}/{name}")) is None:
            return None
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.uploads[value["oid"]]
        commit = self.commit(files)
        where = f"http://{self.headers['Host']}/{'datasets/' if kind == 'datasets' else ''}{name}/commit/{commit}"
        return self.answer(200, {"success": True, "commitOid": commit, "commitUrl": where})

    def do_PUT(self):
        content = self.body()
        oid = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(content).hexdigest() == oid
        self.uploads[oid] = content
        self.answer(200)

    # --- reading

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if found := re.match(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", path):
            kind, name, revision, inside = found.groups()
            if (files := self.files(f"{kind}/{name}", revision)) is None:
                return None
            below = {p: c for p, c in files.items() if p.startswith(f"{inside}/" if inside else "")}
            folders = {"/".join(p.split("/")[:i]) for p in below for i in range(1, p.count("/") + 1)}
            if "recursive=true" not in urlsplit(self.path).query.lower():
                depth = inside.count("/") + 1 if inside else 0
                below = {p: c for p, c in below.items() if p.count("/") == depth}
                folders = {f for f in folders if f.count("/") == depth and f.startswith(inside)}
            entries = [{"type": "directory", "path": f, "oid": "0" * 40} for f in sorted(folders)]
            return self.answer(200, entries + [self.entry(p, c) for p, c in sorted(below.items())])
        if found := re.match(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?$", path):
            kind, name, revision = found.groups()
            if (files := self.files(f"{kind}/{name}", revision)) is None:
                return None
            self.commits[self.commit(files)] = dict(files)
            info = {"id": name, "sha": self.commit(files), "private": True, "tags": [], "downloads": 0, "likes": 0}
            return self.answer(
                200, info | {"siblings": [{"rfilename": p} for p in files], "lastModified": "2026-01-01T00:00:00.000Z"}
            )
        if found := re.match(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, file = found.groups()
            if (files := self.files(f"{'datasets' if kind else 'models'}/{name}", revision)) is None:
                return None
            if file not in files:
                return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            content, commit = files[file], self.commit(files)
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
            if wanted := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
                headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
                return self.answer(206, content[first : last + 1], **headers)
            return self.answer(200, content, **headers)
        return self.answer(404, {"error": f"unknown {path}"})

    do_HEAD = do_GET
