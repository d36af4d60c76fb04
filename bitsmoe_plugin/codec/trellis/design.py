"""Training of the trellis tables: ``python -m bitsmoe_plugin.codec.trellis.design`` prints such a module.

Another machine or numpy gives other tables of the same error, so the shipped ones are part of the format.

Generalised Lloyd iteration: encode Gaussian samples, move every window's value to the mean of
the samples that were encoded with it, repeat; the best of several starts is kept.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from bitsmoe_plugin.codec import trellis
from bitsmoe_plugin.codec.block import BLOCK
from bitsmoe_plugin.codec.trellis import search

_SIZE = 2**trellis.WINDOW


def gaussian_error(values: np.ndarray, bits: int, seed: int, blocks: int = 20_000) -> float:
    """Mean square error of a unit Gaussian under a table ``[2**WINDOW]`` float32."""
    samples, index = _encoded(values, bits, seed, blocks)
    return float(np.square(samples - values[index]).mean())


def _encoded(values: np.ndarray, bits: int, seed: int, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(blocks, BLOCK, generator=generator, device="cpu")
    codes = search.search(torch.from_numpy(values), samples, torch.ones_like(samples), bits)
    return samples.numpy(), trellis.windows(codes, bits).numpy()


def linear_start(bits: int, random: np.random.Generator) -> np.ndarray:
    """A table that a convolutional code labels: the bits of a level's number are parities of
    window bits, such that paths that part or meet differ in the coarse bits (Ungerboeck, 1982).

    Such a start beats random ones by 4 to 7 % of error after training, but for 1 bit.
    """
    oldest, newest = 2**bits - 1, (2**bits - 1) << (trellis.WINDOW - bits)
    parity = np.array([bin(i).count("1") & 1 for i in range(_SIZE)])
    while True:
        coarse = random.integers(1, _SIZE, bits)
        told_apart = [_independent([int(m & part) for m in coarse]) for part in (newest, oldest)]
        fine = int(random.integers(1, _SIZE)) & ~(newest | oldest)
        if all(told_apart) and (fine or bits == trellis.WIDTHS[-1]):
            break
    level = np.zeros(_SIZE, dtype=np.int64)
    for mask in (*coarse, fine):
        level = 2 * level + parity[np.arange(_SIZE) & mask]
    levels = 2 ** (bits + 1)
    means = np.sort(random.standard_normal(levels * 4096)).reshape(levels, -1).mean(1)
    return means[level].astype(np.float32)


def _independent(masks: list[int]) -> bool:
    """Whether no sum over GF(2) of some of the masks is zero."""
    for subset in range(1, 2 ** len(masks)):
        total = 0
        for i, mask in enumerate(masks):
            total ^= mask if subset >> i & 1 else 0
        if total == 0:
            return False
    return True


def random_start(bits: int, random: np.random.Generator) -> np.ndarray:
    """The quantiles of a Gaussian in random order."""
    quantiles = np.sort(random.standard_normal(_SIZE * 512)).reshape(_SIZE, 512).mean(1)
    return random.permutation(quantiles).astype(np.float32)


def train(values: np.ndarray, bits: int, seed: int, iterations: int = 40, blocks: int = 8_000) -> np.ndarray:
    """A table ``[2**WINDOW]`` int8 in units of ``trellis.STEP`` from a start, float32."""
    for iteration in range(iterations):
        samples, index = _encoded(values, bits, 1000 * seed + iteration, blocks)
        hits = np.bincount(index.ravel(), minlength=_SIZE)
        sums = np.bincount(index.ravel(), weights=samples.ravel(), minlength=_SIZE)
        values = np.where(hits > 20, sums / np.maximum(hits, 1), values).astype(np.float32)
    return np.clip(np.round(values / trellis.STEP), -127, 127).astype(np.int8)


def best_table(bits: int, candidates: int, trained: int) -> tuple[np.ndarray, float]:
    """The best table of some starts, and its error on samples that it was not chosen by."""
    random = np.random.default_rng(bits)
    starts = [linear_start(bits, random) for _ in range(candidates)]
    starts.sort(key=lambda start: gaussian_error(start, bits, 1, blocks=1000))
    starts = starts[:trained] + [random_start(bits, random) for _ in range(trained)]
    tables = [train(start, bits, seed) for seed, start in enumerate(starts)]
    errors = [gaussian_error(t.astype(np.float32) * trellis.STEP, bits, 10**6) for t in tables]
    table = tables[int(np.argmin(errors))]
    return table, gaussian_error(table.astype(np.float32) * trellis.STEP, bits, 10**7)


def main(candidates: int, trained: int) -> None:
    """Print the source of ``tables.py``."""
    print(
        '"""Tables of ``trellis``: int8 values in units of 1/32, by width; made by ``trellis.design``."""\n'
    )
    print("from __future__ import annotations\n\nimport numpy as np\n\n_HEX = {")
    for bits in trellis.WIDTHS:
        values, error = best_table(bits, candidates, trained)
        text = values.tobytes().hex()
        print(f"    {bits}: (  # mean square error {error:.5f}")
        for start in range(0, len(text), 64):
            print(f'        "{text[start : start + 64]}"')
        print("    ),", flush=True)
    print("}\n\nTABLES = {bits: np.frombuffer(bytes.fromhex(text), np.int8) for bits, text in _HEX.items()}")


if __name__ == "__main__":
    main(*(map(int, sys.argv[1:]) if len(sys.argv) > 1 else (200, 4)))
