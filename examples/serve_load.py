"""Put a ``vllm serve`` under load and see whether it loses requests, memory or its mind.

python examples/serve_load.py out/moe-tiny-2bit --requests 2000 [-- options of vllm serve]
python examples/serve_load.py --url http://127.0.0.1:8000/v1 --name NAME --pid PID --requests 2000

Runs with the interpreter of an environment that has vLLM (``make install-vllm``: .venv-vllm/bin/python). It
lies here and not in the package because it needs a client (aiohttp) and psutil, which come with vLLM.

Requests of mixed lengths, whole and streamed, come from several clients at once; some leave while they wait
or in the middle of a stream, some send what is no request (``serve_clients``). Checked are: every sound
request gets all its tokens, every other one a status of 400 to 499; greedy answers to some prompts are those
that the idle server gave; when all clients are gone, nothing runs, waits or holds cache; and the server's
memory has not grown since a quarter of the requests were done. The status is 1 if anything is not so.
Talks to this machine alone.

On a CPU, torch multiplies through oneDNN, which compiles a kernel for every number of tokens that a batch has
and keeps 1024 of them, of any model: that alone grows by 400 MB over 10,000 requests. A server that is
started here keeps ``KERNELS``, unless ONEDNN_PRIMITIVE_CACHE_CAPACITY says otherwise, so that what else grows
shows.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import time
from contextlib import nullcontext
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil
from serve_clients import CLIENTS, Load, ask
from serve_compare import server

GROWTH_BYTES = 2**26
"""That resident memory may grow after the first quarter."""
KERNELS = 64
"""Of oneDNN that the server keeps."""
SECONDS = 300
"""A request may take."""
SAMPLE = 16


async def send(load: Load, numbers: range, concurrency: int, seed: int) -> None:
    """Send requests by number, so many at once."""
    waiting = iter(numbers)

    async def work() -> None:
        for number in waiting:
            rng = random.Random(f"{seed} {number}")
            (client,) = rng.choices(list(CLIENTS), list(CLIENTS.values()))
            load.counts[client.__name__] += 1
            try:
                await client(load, rng)
            except (AssertionError, aiohttp.ClientError, OSError, ValueError, KeyError) as error:
                load.failures.append(f"request {number}, {client.__name__}: {type(error).__name__} {error}")

    await asyncio.gather(*(work() for _ in range(concurrency)))


async def rest(load: Load) -> None:
    """Wait until the server has noticed who left; note what it still holds after half a minute."""
    for _ in range(60):
        async with load.session.get(load.url.removesuffix("v1") + "metrics") as answer:
            lines = [line.split() for line in (await answer.text()).splitlines() if line.startswith("vllm:")]
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        held = {n: float(line[-1]) for n in names for line in lines if line[0].startswith(f"vllm:{n}{{")}
        if len(held) == len(names) and not any(held.values()):
            return
        await asyncio.sleep(0.5)
    load.failures.append(f"half a minute after the last client left: {held}")


def resident(pid: int) -> int:
    """Bytes of all processes of the server."""
    process = psutil.Process(pid)
    return sum(member.memory_info().rss for member in (process, *process.children(recursive=True)))


async def run(url: str, name: str, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    """Everything; returns what happened."""
    limits = aiohttp.ClientTimeout(total=SECONDS)
    connector = aiohttp.TCPConnector(limit=args.concurrency)
    async with aiohttp.ClientSession(timeout=limits, connector=connector) as session:
        load, rng = Load(url, name, session), random.Random(args.seed)
        for _ in range(SAMPLE):
            body = load.body(rng, max_tokens=24, logprobs=2, return_token_ids=True)
            load.greedy.append((body, await ask(load, body)))
        started, memory = time.monotonic(), [resident(pid)]
        edges = [args.requests * quarter // 4 for quarter in range(5)]
        for first, last in itertools.pairwise(edges):
            await send(load, range(first, last), args.concurrency, args.seed)
            await rest(load)
            memory.append(resident(pid))
        seconds = time.monotonic() - started
    growth = memory[-1] - memory[1]
    if growth > GROWTH_BYTES:
        load.failures.append(f"memory grew by {growth} bytes after the first quarter; {GROWTH_BYTES} may be")
    return {
        "requests": dict(sorted(load.counts.items())),
        "concurrency": args.concurrency,
        "seconds": round(seconds, 1),
        "resident_megabytes_idle_and_after_each_quarter": [round(size / 1e6, 1) for size in memory],
        "greedy_answers_that_differ_after_a_near_tie": load.near_ties,
        "failures": load.failures,
    }


def main() -> int:
    """Print what happened as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="directory; then -- and options for vllm serve, if any")
    parser.add_argument("--url", help="of a server that runs already, ending in /v1")
    parser.add_argument("--name", default="model", help="of its model")
    parser.add_argument("--pid", type=int, help="of its first process")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:split])
    if bool(args.model) == bool(args.url) or bool(args.url) != bool(args.pid):
        parser.error("give the directory of a model, or --url and --pid of a server")
    if args.url and urlsplit(args.url).hostname not in ("127.0.0.1", "localhost"):
        parser.error(f"--url {args.url}: load is put on this machine alone (127.0.0.1)")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))
    started = server(args.model, sys.argv[split + 1 :]) if args.model else nullcontext((args, args.url))
    with started as (process, url):
        result = asyncio.run(run(url, args.name, process.pid, args))
    print(json.dumps(result, indent=2))
    return bool(result["failures"])


if __name__ == "__main__":
    sys.exit(main())
