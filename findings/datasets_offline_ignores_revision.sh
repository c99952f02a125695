#!/usr/bin/env bash
# datasets 5.2.0, huggingface_hub 2.4.0 (Python 3.11): without a network `load_dataset(name, revision=R)` gives the
# revision that was fetched last, whatever R is, also one that was never fetched; nothing is raised, and the rows look
# right.
#
# A run that pins a data set's commit is so only as long as the hub answers. Offline (`HF_HUB_OFFLINE=1`, a machine of a
# cluster without a network) the module's cache is searched by name and newest first, and the revision is not compared.
# Whoever must know compares the commit in the path of `Dataset.cache_files` with the one that was asked for.
# The hub here is a server on this machine with one data set of two commits; the client is the library's own.
#
# Output seen:
#   with a network:    aaaa -> ['row of commit aaaa'], bbbb -> ['row of commit bbbb']
#   without a network: aaaa -> ['row of commit bbbb'], cccc -> ['row of commit bbbb']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'datasets==5.2.0' 'huggingface_hub==2.4.0'
cat > "$folder/load.py" <<'PYTHON'
import json
import sys

from datasets import disable_progress_bars, load_dataset

disable_progress_bars()
found = {}
for letter in sys.argv[1:]:
    found[letter] = load_dataset("someone/rows", split="train", revision=letter * 40)["text"][:]
print(json.dumps(found))
PYTHON
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FILE, API = "train.jsonl", "/api/datasets/someone/rows"
CONTENT = {letter * 40: json.dumps({"text": f"row of commit {letter * 4}"}).encode() for letter in "ab"}


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        commit = next((sha for sha in CONTENT if sha in path), "a" * 40)
        headers, status = {"X-Repo-Commit": commit, "ETag": f'"{commit}"'}, 200
        if path.startswith(f"{API}/tree/"):
            body = json.dumps([{"type": "file", "path": FILE, "size": len(CONTENT[commit]), "oid": commit}]).encode()
        elif path.startswith(API):
            body = json.dumps({"id": "someone/rows", "sha": commit, "siblings": [{"rfilename": FILE}]}).encode()
        elif path.endswith(f"/{FILE}"):
            body = CONTENT[commit]
        else:
            body, status, headers = b"{}", 404, {"X-Error-Code": "EntryNotFound"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET

    def log_message(self, *_):
        pass


def load(*letters, **environment):
    words = [sys.executable, f"{sys.argv[1]}/load.py", *letters]
    told = {"HF_HOME": f"{sys.argv[1]}/home", "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    done = subprocess.run(words, env=os.environ | told, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(done.stdout)


server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
online = load("a", "b", HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
server.shutdown()
offline = load("a", "c", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
for title, found in (("with a network:   ", online), ("without a network:", offline)):
    print(title, ", ".join(f"{letter * 4} -> {rows}" for letter, rows in found.items()))
assert online == {"a": ["row of commit aaaa"], "b": ["row of commit bbbb"]}, "the hub of this script no longer serves"
assert offline == {"a": ["row of commit bbbb"], "c": ["row of commit bbbb"]}, "the revision counts offline now"
PYTHON
