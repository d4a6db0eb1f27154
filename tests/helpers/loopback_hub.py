"""A stand-in for the Hub on the loopback: what uploading, downloading and reading headers ask of it."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import unquote, urlsplit

REPO = r"([\w.-]+/[\w.-]+)"


class Hub(BaseHTTPRequestHandler):
    """Repositories as dictionaries of revisions, each of files; those in ``private`` want a token."""

    protocol_version = "HTTP/1.1"
    repos: ClassVar[dict[str, dict[str, dict[str, bytes]]]] = {}
    blobs: ClassVar[dict[str, bytes]] = {}
    private: ClassVar[set[str]] = set()
    requests: ClassVar[list[str]] = []

    def log_message(self, *args):
        """Say nothing."""

    def answer(self, body=b"", status=200, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if (asked := self.headers.get("Range")) and status == 200 and self.command == "GET":
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
            headers["Content-Range"] = f"bytes {first}-{last or len(data) - 1}/{len(data)}"
            data, status = data[int(first) : int(last or len(data)) + 1], 206
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = b""
        while size := int(self.rfile.readline(), 16):
            parts += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return parts

    def sha(self, repo, revision):
        named = sorted((n, hashlib.sha1(c).hexdigest()) for n, c in self.repos[repo][revision].items())
        return hashlib.sha1(repr((repo, named)).encode()).hexdigest()

    def revision_of(self, repo, revision):
        """Return the name of a branch for a name or a commit."""
        branches = self.repos[repo]
        return revision if revision in branches else next(b for b in branches if self.sha(repo, b) == revision)

    def hidden(self, repo):
        """Answer as for what is not there, or may not be seen."""
        if repo in self.repos and (repo not in self.private or "Authorization" in self.headers):
            return False
        status = 404 if "Authorization" in self.headers else 401
        self.answer({"error": "Repository not found"}, status, X_Error_Code="RepoNotFound")
        return True

    def do_POST(self):
        path, data, host = unquote(urlsplit(self.path).path), self.body(), f"http://{self.headers['Host']}"
        query = urlsplit(self.path).query
        self.requests.append(f"POST {path}")
        if path == "/api/repos/create":
            asked = json.loads(data)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = repo in self.repos
            self.repos.setdefault(repo, {"main": {}})
            if asked.get("private") or asked.get("visibility") == "private":
                self.private.add(repo)
            self.answer({"url": f"{host}/{repo}", "name": repo, "id": repo}, 409 if known else 200)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif re.fullmatch(f"/api/models/{REPO}/preupload/.+", path):
            modes = [(f["path"], f["path"].endswith((".safetensors", ".bin"))) for f in json.loads(data)["files"]]
            files = [{"path": p, "uploadMode": "lfs" if big else "regular", "shouldIgnore": False} for p, big in modes]
            self.answer({"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(data)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{host}/lfs/{each['oid']}"}}
            self.answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(f"/api/models/{REPO}/commit/(.+)", path):
            repo, revision = found.groups()
            new_branch = revision
            if "create_pr=1" in query:
                new_branch = "refs/pr/1"
            files = dict(self.repos[repo].get(revision, {}))
            for line in data.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.blobs[value["oid"]]
            self.repos[repo][new_branch] = files
            url = f"{host}/{repo}"
            pull = {"pullRequestUrl": f"{url}/discussions/1"} if new_branch != revision else {}
            sha = self.sha(repo, new_branch)
            self.answer({"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", **pull})
        else:
            self.answer({"error": "not found"}, 404)

    def do_PUT(self):
        self.blobs[self.path.rsplit("/", 1)[1]] = self.body()
        self.answer()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}")
        if path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user", "orgs": []})
        elif found := re.fullmatch(f"/{REPO}/resolve/(refs/pr/\\d+|[^/]+)/(.+)", path):
            repo, revision, name = found.groups()
            if self.hidden(repo):
                return
            branch = self.revision_of(repo, revision)
            files, sha = self.repos[repo][branch], self.sha(repo, branch)
            if name not in files:
                self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
                return
            tag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
            self.answer(files[name], ETag=tag, X_Repo_Commit=sha, Content_Type="application/octet-stream")
        elif found := re.fullmatch(f"/api/models/{REPO}/tree/(refs/pr/\\d+|[^/]+)(?:/(.*))?", path):
            repo, revision, under = found.groups()
            if self.hidden(repo):
                return
            files = self.repos[repo][self.revision_of(repo, revision)].items()
            sizes = [(p, len(c), hashlib.sha1(c).hexdigest()) for p, c in files if p.startswith(under or "")]
            self.answer([{"type": "file", "path": p, "size": size, "oid": oid} for p, size, oid in sizes])
        elif found := re.fullmatch(f"/api/models/{REPO}(?:/revision/(.+))?", path):
            repo, revision = found[1], found[2] or "main"
            if self.hidden(repo):
                return
            branch = self.revision_of(repo, revision)
            files = [{"rfilename": p} for p in self.repos[repo][branch]]
            told = {"id": repo, "modelId": repo, "private": repo in self.private, "tags": []}
            self.answer({**told, "sha": self.sha(repo, branch), "siblings": files})
        else:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


def serve():
    """Start the stand-in and return its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"
