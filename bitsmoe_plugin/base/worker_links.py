"""Connections between the first of several processes and each of the others, beside torch.distributed.

When a process dies, the system ends its connections: whoever is at their other end knows at once, without a
message of the dead, also while it computes.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import time
import warnings
from contextlib import closing
from typing import Any

import torch.distributed as dist

Address = tuple[list[str], int, str]
"""Hosts by which the first process may be reached, its port, and the word that strangers do not know."""

_SECONDS = 10.0
"""For all to connect; for a line of theirs."""
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 5}
"""Seconds, and how often: nothing else tells that a machine is gone."""


def connect(rank: int, size: int) -> dict[int, socket.socket]:
    """Connections by rank: of the first process to all others, of the others to the first.

    All processes call this together. There are none if one cannot reach the first, which then warns.
    """
    hosts = gathered(socket.gethostname(), size)
    alike = len(set(hosts)) == 1
    if rank == 0:
        with closing(socket.create_server(("127.0.0.1" if alike else "", 0), backlog=size)) as server:
            word, port = secrets.token_hex(), server.getsockname()[1]
            known = ["127.0.0.1"] if alike else [os.environ.get("MASTER_ADDR", hosts[0]), hosts[0]]
            gathered((known, port, word), size)
            links = _accepted(server, word, size)
    else:
        links = _reached(gathered(None, size)[0], rank)
    if all(gathered(len(links) == (1 if rank else size - 1), size)):
        return links
    for link in links.values():
        link.close()
    if rank == 0:
        warnings.warn(
            f"not all of {size} processes can connect to the first one ({known[0]}): if one of them "
            "fails, the others end at their next exchange, not at once",
            stacklevel=2,
        )
    return {}


def gathered(own: Any, size: int) -> list[Any]:
    """What every process gives, by rank; all call this together."""
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, own)
    return parts


def _accepted(server: socket.socket, word: str, size: int) -> dict[int, socket.socket]:
    """Those who know the word, by the rank that they say, until all are here or the time is over."""
    links: dict[int, socket.socket] = {}
    end = time.monotonic() + _SECONDS
    while len(links) < size - 1 and (left := end - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            link, _ = server.accept()
        except TimeoutError:
            break
        rank = _introduced(link, word)
        if rank in range(1, size) and rank not in links:
            links[rank] = _kept_open(link)
        else:
            link.close()
    return links


def _introduced(link: socket.socket, word: str) -> int:
    """The rank that the process at the other end says after the word; 0 if it does not know it."""
    link.settimeout(_SECONDS / 10)
    said = b""
    try:
        while not said.endswith(b"\n") and len(said) < 100 and (part := link.recv(100)):
            said += part
    except OSError:  # it is no worker, or gone
        return 0
    told, _, rank = said.decode("ascii", "replace").strip().partition(" ")
    return int(rank) if hmac.compare_digest(told, word) and rank.isdecimal() else 0


def _reached(address: Address, rank: int) -> dict[int, socket.socket]:
    hosts, port, word = address
    for host in hosts:
        try:
            link = socket.create_connection((host, port), timeout=_SECONDS / len(hosts) / 2)
            link.sendall(f"{word} {rank}\n".encode("ascii"))
        except OSError:  # the next host, or none: that is agreed on by all
            continue
        return {0: _kept_open(link)}
    return {}


def _kept_open(link: socket.socket) -> socket.socket:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return link
