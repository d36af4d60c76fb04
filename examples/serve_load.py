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

Memory is what the processes have written, each page counted once: anonymous and shared memory, in RAM or
swapped out, not the pages of files. The key-value cache is in it from the start (vLLM zeroes it). oneDNN
keeps a compiled product per weight shape and number of tokens, 1024 of them unless
``ONEDNN_PRIMITIVE_CACHE_CAPACITY`` says otherwise, and fills them over thousands of requests, whatever the
experts are made of. A server started here keeps ``PRIMITIVES``, so that it is full after the first quarter
of a few thousand requests and what grows later is a leak; start one for --url with the same setting.
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
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil
from serve_clients import CLIENTS, Load, ask
from serve_compare import server

PRIMITIVES = 64
"""That oneDNN may keep in a server started here."""
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


def written(pid: int) -> Counter[str]:
    """Bytes of anonymous and shared memory, by name of the server's processes."""
    process, sizes = psutil.Process(pid), Counter[str]()
    for member in (process, *process.children(recursive=True)):
        lines = Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines()[1:]
        fields = dict(line.split(":") for line in lines)
        kilobytes = (fields[name].split()[0] for name in ("Pss_Anon", "Pss_Shmem", "SwapPss"))
        sizes[member.name()] += 1024 * sum(map(int, kilobytes))
    return sizes


async def run(url: str, name: str, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    """Everything; returns what happened."""
    limits = aiohttp.ClientTimeout(total=SECONDS)
    # Each request on its own: the server closes connections that idle, and on a busy machine any may.
    connector = aiohttp.TCPConnector(limit=args.concurrency, force_close=True)
    async with aiohttp.ClientSession(timeout=limits, connector=connector) as session:
        load, rng = Load(url, name, session), random.Random(args.seed)
        for _ in range(SAMPLE):
            body = load.body(rng, max_tokens=24, logprobs=2, return_token_ids=True)
            load.greedy.append((body, await ask(load, body)))
        started, memory = time.monotonic(), [written(pid)]
        edges = [args.requests * quarter // 4 for quarter in range(5)]
        for first, last in itertools.pairwise(edges):
            await send(load, range(first, last), args.concurrency, args.seed)
            await rest(load)
            memory.append(written(pid))
        seconds = time.monotonic() - started
    growth = memory[-1].total() - memory[1].total()
    if growth > args.growth * 1e6:
        load.failures.append(f"memory grew by {growth / 1e6:.1f} MB, more than {args.growth}")
    return {
        "requests": dict(sorted(load.counts.items())),
        "concurrency": args.concurrency,
        "seconds": round(seconds, 1),
        "megabytes_idle_and_after_each_quarter": {
            name: [round(sizes[name] / 1e6, 1) for sizes in memory] for name in memory[0]
        },
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
    parser.add_argument("--growth", type=int, default=32, help="MB allowed after the first quarter")
    parser.add_argument("--seed", type=int, default=0)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:split])
    if bool(args.model) == bool(args.url) or bool(args.url) != bool(args.pid):
        parser.error("give the directory of a model, or --url and --pid of a server")
    if args.url and urlsplit(args.url).hostname not in ("127.0.0.1", "localhost"):
        parser.error(f"--url {args.url}: load is put on this machine alone (127.0.0.1)")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))
    started = server(args.model, sys.argv[split + 1 :]) if args.model else nullcontext((args, args.url))
    with started as (process, url):
        result = asyncio.run(run(url, args.name, process.pid, args))
    print(json.dumps(result, indent=2))
    return bool(result["failures"])


if __name__ == "__main__":
    sys.exit(main())
