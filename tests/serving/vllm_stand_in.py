"""Speaks vLLM's HTTP interface, as `vllm serve` 0.32 does it, without a model: vLLM itself takes minutes to start.

`main(folder)` is the program: it writes its command line and each request into `folder`. It has a child, as vLLM has.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

ROOT = Path(__file__).parents[2]


def program(folder: Path) -> Path:
    """Write the program `vllm` into the folder."""
    file = folder / "vllm"
    here = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom tests.serving.vllm_stand_in import main\n"
    file.write_text(f"#!{sys.executable}\n{here}main({str(folder)!r})\n")
    file.chmod(0o755)
    return file


def main(folder: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("serve", choices=["serve"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--dtype", choices=["auto", "half", "float16", "bfloat16", "float", "float32"], required=True)
    options = parser.parse_args()
    assert (options.model / "config.json").is_file()
    Path(folder, "command.json").write_text(json.dumps([str(each) for each in vars(options).values()]))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    print(f"stand-in: child {child.pid}", flush=True)
    _Handler.folder, _Handler.name = Path(folder), options.served_model_name
    ThreadingHTTPServer((options.host, options.port), _Handler).serve_forever()


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    name: str
    lock = Lock()

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200 if self.path == "/health" else 404, b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if (key := os.environ.get("VLLM_API_KEY")) and self.headers["Authorization"] != f"Bearer {key}":
            return self._send(401, json.dumps({"error": "Unauthorized"}).encode())
        with self.lock, (self.folder / "requests.jsonl").open("a") as file:
            file.write(json.dumps(body) + "\n")
        prompt = body["prompt"]
        if prompt == "wait":
            while not (self.folder / "go").exists():
                time.sleep(0.02)
        if prompt == "die":
            print("stand-in: out of memory", flush=True)
            os._exit(3)
        if prompt == "break":
            return self._send(500, b"Internal Server Error")
        if prompt in ("refuse", ""):  # it takes no empty text
            why = "too hard" if prompt else "Either prompt or prompt_embeds must be provided and non-empty."
            return self._send(400, json.dumps({"error": {"message": why, "code": 400}}).encode())
        if body["model"] != self.name:
            return self._send(404, b"{}")
        several = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        texts = [f"{each}!" for each in several for _ in range(body.get("n", 1))]
        choices = [{"index": at, "text": text, "finish_reason": "length"} for at, text in enumerate(texts)]
        if not body.get("stream"):
            return self._send(200, json.dumps({"id": "1", "model": self.name, "choices": choices}).encode())
        self.send_response(200)
        self.end_headers()
        for choice in choices:
            self.wfile.write(b"data: " + json.dumps({"model": self.name, "choices": [choice]}).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
