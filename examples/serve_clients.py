"""Clients of a ``vllm serve``, of good and bad manners; for ``serve_load.py``."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

NEAR_TIE = 1e-3
"""Difference of two log-probabilities below which either token is the greedy one: other requests in a batch
change the order of summation (up to 1.1e-5 was measured in float32, see tests/support/vllm_support.py)."""
WORDS = "in the beginning there was a word and it said to all who came that they should go home"


@dataclass
class Load:
    """A server under test, and what happened.

    Attributes:
        url: of its API, ending in /v1.
        name: of the model.
        counts: kind of request -> requests.
        failures: what should not have been.
        greedy: requests with the answers of the idle server: (token ids, two log-probabilities of each).
        near_ties: answers that differ from these where two tokens were equally likely.
    """

    url: str
    name: str
    session: aiohttp.ClientSession
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    greedy: list[tuple[dict[str, Any], tuple[list[int], list[float]]]] = field(default_factory=list)
    near_ties: int = 0

    def body(self, rng: random.Random, **changes: Any) -> dict[str, Any]:
        """A sound request."""
        words = [rng.choice(WORDS.split()) for _ in range(rng.choice((1, 5, 20, 80, 200)))]
        ids = [rng.randrange(1, 1000) for _ in words]
        sound = {"model": self.name, "prompt": rng.choice((" ".join(words), ids)), "ignore_eos": True}
        return {**sound, "max_tokens": rng.choice((1, 4, 16, 48)), "temperature": 0, **changes}

    def post(self, body: Any, path: str = "completions", **options: Any) -> Any:
        """The open answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return self.session.post(f"{self.url}/{path}", data=data, headers=headers, **options)


async def whole(load: Load, rng: random.Random) -> None:
    """An answer in one piece, sometimes sampled."""
    body = load.body(rng, temperature=rng.choice((0, 0.8)), seed=rng.randrange(1000))
    async with load.post(body) as answer:
        assert answer.status == 200, f"status {answer.status}: {(await answer.text())[:200]}"
        tokens = (await answer.json())["usage"]["completion_tokens"]
    assert tokens == body["max_tokens"], f"{tokens} tokens of {body['max_tokens']}"


async def streamed(load: Load, rng: random.Random) -> None:
    """An answer token by token, to its end."""
    body = load.body(rng, stream=True, stream_options={"include_usage": True})
    tokens, last = 0, ""
    async with load.post(body) as answer:
        assert answer.status == 200, f"status {answer.status}: {(await answer.text())[:200]}"
        async for line in answer.content:
            if line.startswith(b"data: "):
                last = line.decode()[6:].strip()
                if last != "[DONE]":
                    tokens = (json.loads(last).get("usage") or {}).get("completion_tokens", tokens)
    assert last == "[DONE]", f"the stream ended with {last[:200]!r}"
    assert tokens == body["max_tokens"], f"{tokens} tokens of {body['max_tokens']}"


async def leaves_waiting(load: Load, rng: random.Random) -> None:
    """A client that hangs up before it has an answer."""
    try:
        limit = aiohttp.ClientTimeout(total=rng.choice((0.005, 0.05, 0.3)))
        async with load.post(load.body(rng, max_tokens=200), timeout=limit) as answer:
            await answer.read()
    except asyncio.TimeoutError:
        pass


async def leaves_reading(load: Load, rng: random.Random) -> None:
    """A client that hangs up in the middle of a stream."""
    async with load.post(load.body(rng, max_tokens=200, stream=True)) as answer:
        assert answer.status == 200, f"status {answer.status}: {(await answer.text())[:200]}"
        for _ in range(rng.choice((0, 1, 5))):
            await answer.content.readline()
        answer.close()


def _malformed(load: Load, rng: random.Random) -> list[Any]:
    sound = load.body(rng)
    changes: tuple[dict[str, Any], ...] = (
        *({"prompt": value} for value in ("", [], 7, [10**9], [-1], "word " * 10_000, {"a": 1})),
        *({"max_tokens": value} for value in (-1, 10**9, "many", 2.5)),
        *({"temperature": value} for value in (-1, "hot")),
        *({"n": value} for value in (-1, "two")),
        {"model": "another"},
        {"logprobs": 10**6},
        {"top_p": 7},
        {"stop": 3},
    )
    bytes_ = (b"", b"{", b"[]", b"\xff\xfe", b'{"a":' * 5000, json.dumps(sound).encode()[:-1])
    return [*({**sound, **change} for change in changes), *bytes_]


async def malformed(load: Load, rng: random.Random) -> None:
    """Something that is no request: refused as the client's mistake."""
    body = rng.choice(_malformed(load, rng))
    async with load.post(body) as answer:
        text = (await answer.text())[:200]
    assert 400 <= answer.status < 500, f"status {answer.status} for {str(body)[:200]}: {text}"


async def wrong_path(load: Load, rng: random.Random) -> None:
    """A place that is not there, or another verb."""
    verb, path = rng.choice((("GET", "completions"), ("POST", "nothing"), ("PUT", "completions")))
    async with load.session.request(verb, f"{load.url}/{path}") as answer:
        assert 400 <= answer.status < 500, f"status {answer.status} for {verb} {path}"


async def half_a_request(load: Load, rng: random.Random) -> None:
    """A body shorter than was announced."""
    parts = urlsplit(load.url)
    _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    await writer.drain()
    await asyncio.sleep(rng.choice((0, 0.05)))
    writer.close()


async def ask(load: Load, body: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Token ids, and by how much each was likelier than the next best."""
    async with load.post(body) as answer:
        assert answer.status == 200, f"status {answer.status}: {(await answer.text())[:200]}"
        choice = (await answer.json())["choices"][0]
    best = [sorted(entry.values(), reverse=True) for entry in choice["logprobs"]["top_logprobs"]]
    return choice["token_ids"], [values[0] - values[1] for values in best]


async def greedy(load: Load, rng: random.Random) -> None:
    """The answer of the idle server, but for what is a matter of chance after a near tie."""
    body, (wanted, margins) = rng.choice(load.greedy)
    tokens, _ = await ask(load, body)
    different = next(
        (i for i, pair in enumerate(zip(tokens, wanted, strict=True)) if pair[0] != pair[1]), None
    )
    if different is not None:
        load.near_ties += 1
        assert margins[different] < NEAR_TIE, f"token {different} differs, margin {margins[different]:.2g}"


Client = Callable[[Load, random.Random], Awaitable[None]]
CLIENTS: dict[Client, int] = {
    whole: 30,
    streamed: 25,
    greedy: 15,
    leaves_waiting: 8,
    leaves_reading: 8,
    malformed: 10,
    wrong_path: 2,
    half_a_request: 2,
}
"""Kind of request -> share in percent."""
