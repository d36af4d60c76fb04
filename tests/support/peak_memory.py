"""Quantize or tune a model and print the peak of this process's memory in bytes.

``python peak_memory.py MODEL OUT [PACKED]`` quantizes a model, or tunes what was packed of it. Prints a JSON
object: ``resident`` (all that was mapped in, files included) and ``anonymous`` (what the kernel cannot take
back).
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bitsmoe_plugin import BitsMoEConfig, QuantizationError
from bitsmoe_plugin.commands.tune import tune_to_directory
from bitsmoe_plugin.integrations.transformers import quantize_to_directory
from bitsmoe_plugin.pipeline.tuning_settings import TuningSettings


def anonymous() -> int:
    """Bytes of anonymous memory now."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def watched(action: Callable[[], None]) -> int:
    """Most anonymous memory while ``action`` runs."""
    peak, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    done.set()
    watcher.join()
    return peak[0]


_QUIET = {
    "LRU_CACHE_CAPACITY": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "524288",
    "MALLOC_TRIM_THRESHOLD_": "524288",
}


def measured(model: Path, out: Path, *packed: Path) -> dict[str, int]:
    """What a process that quantizes a model, or tunes it when it is packed, prints.

    What is no memory of ours is kept out: torch's cache of compiled 16-bit products, which grows with the
    number of shapes, and what the allocator has been given back, but not returned to the system.
    """
    command = [sys.executable, __file__, str(model), str(out), *map(str, packed)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_QUIET}, check=False)
    assert done.returncode == 0, done.stderr
    peaks: dict[str, int] = json.loads(done.stdout)
    return peaks


def tune(packed: str, model: str, out: str, tokens: list[int]) -> None:
    """Layer by layer."""
    settings = TuningSettings(epochs=1, batch_size=1, held_out=0.25, through="layers")
    given = packed, model, Path(out), [tokens], settings
    try:
        tune_to_directory(*given, calibration_tokens=256, sequence_length=64)
    except QuantizationError as error:
        if "no epoch came closer" not in str(error):  # of noise there may be nothing to learn
            raise


def main(model: str, out: str, packed: str = "") -> None:
    """See the module."""
    torch.set_num_threads(1)
    tokens = torch.randint(1, 256, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    config = BitsMoEConfig(
        bits=2.5, dataset=[tokens], sequence_length=64, method="paper-v2", widths=(0, 2, 4)
    )
    if packed:
        peak = watched(lambda: tune(packed, model, out, tokens))
    else:
        peak = watched(lambda: quantize_to_directory(model, Path(out), config))
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"resident": resident, "anonymous": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
