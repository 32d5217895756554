"""A stand-in of the HuggingFace Hub: the few answers that ``huggingface_hub`` needs to read files, on a local port."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

#: The commits of every repository: "main" is the newest, "v1" the first.
COMMITS = {"v1": "1" * 40, "main": "2" * 40}


class Hub:
    """``files`` holds contents by repository and path: {"owner/name" or "datasets/owner/name": {path: bytes}}.

    A content may be a dict of contents by revision. ``gated`` are repositories that need access.
    """

    def __init__(self, files, gated=()):
        self.files, self.gated, self.asked = files, set(gated), []

    def answer(self, path):
        """The status, the headers and the body of an answer."""
        self.asked.append(path)
        form = r"(?:/api/models|/api)?/((?:datasets/)?[^/]+/[^/]+)/(resolve|revision|tree)/([^/]+)/?(.*)"
        found = re.fullmatch(form, path)
        if not found:
            return 404, {}, b""
        repo, what, revision, inner = found.groups()
        commit = COMMITS.get(revision, revision)
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if repo not in self.files:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if commit not in COMMITS.values():
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        version = next(name for name, known in COMMITS.items() if known == commit)
        files = {
            name: content[version] if isinstance(content, dict) else content
            for name, content in self.files[repo].items()
        }
        if what == "resolve" and inner in files:
            etag = hashlib.sha256(files[inner]).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, files[inner]
        if what == "resolve":
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        tree = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]
        about = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        body = json.dumps(tree if what == "tree" else about).encode()
        return 200, {"Content-Type": "application/json"}, body

    @contextmanager
    def serving(self):
        """Serve on a free port of this machine, whose address is given."""

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler):
                status, headers, body = self.answer(unquote(urlsplit(handler.path).path))
                handler.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    handler.send_header(name, value)
                handler.end_headers()
                if handler.command == "GET":
                    handler.wfile.write(body)

            do_HEAD = do_GET

            def log_message(handler, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
