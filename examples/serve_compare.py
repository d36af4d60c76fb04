"""Serve models with ``vllm serve`` one after the other; compare memory and speed.

python examples/serve_compare.py examples/moe-tiny out/moe-tiny-2bit [-- options of vllm serve]

Runs with the interpreter of an environment that has vLLM (``make install-vllm``: .venv-vllm/bin/python).
Memory is the proportional set size of all processes of the server once it answers, less its key-value
cache; speed is generated tokens per second, one request alone and 16 at once.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil

CACHE_BYTES = 2**30
TOKENS = 64
REQUESTS = 16


@contextmanager
def server(model: str, options: list[str]) -> Iterator[tuple[psutil.Process, str]]:
    """A running server of a model: its process and the address of its API."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", "model", *options]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": str(CACHE_BYTES // 2**30)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while not _answers(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"vllm serve {model} stopped:\n{log.read()[-4000:]}")
                time.sleep(1)
            yield psutil.Process(process.pid), f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait()


def _answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def generate(url: str, prompt: str) -> int:
    """Generate ``TOKENS`` tokens; returns how many came."""
    body = {"model": "model", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode(), headers)
    return json.load(urllib.request.urlopen(request))["usage"]["completion_tokens"]


def tokens_per_second(url: str, requests: int) -> float:
    """Of so many requests at once."""
    prompts = ["In the beginning" + " there was a word" * (i % 8) for i in range(requests)]
    started = time.perf_counter()
    with ThreadPoolExecutor(requests) as pool:
        tokens = sum(pool.map(lambda prompt: generate(url, prompt), prompts))
    return tokens / (time.perf_counter() - started)


def expert_bytes(model: str) -> int:
    """Bytes of all routed experts in the files of a checkpoint."""
    total = 0
    for file in Path(model).glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        sizes = {name: entry["data_offsets"] for name, entry in header.items() if ".experts." in name}
        total += sum(end - start for start, end in sizes.values())
    return total


def measure(model: str, options: list[str]) -> dict[str, float]:
    """One row of the table."""
    with server(model, options) as (process, url):
        generate(url, "warm up")
        family = [process, *process.children(recursive=True)]
        memory = sum(member.memory_full_info().pss for member in family) - CACHE_BYTES
        alone, together = tokens_per_second(url, 1), tokens_per_second(url, REQUESTS)
    return {
        "experts, MB": expert_bytes(model) / 1e6,
        "server, MB": memory / 1e6,
        "tokens/s, 1": alone,
        f"tokens/s, {REQUESTS}": together,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="directories; then -- and options for vllm serve, if any")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    models = parser.parse_args(sys.argv[1:split]).models
    rows = {model: measure(model, sys.argv[split + 1 :]) for model in models}
    names = list(next(iter(rows.values())))
    print("| model | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for model, row in rows.items():
        print(f"| {model} | " + " | ".join(f"{value:.1f}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
