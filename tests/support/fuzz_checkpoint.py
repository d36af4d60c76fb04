"""Feed altered packed checkpoints to a reader: each must be refused by one of our errors, or be sound.

    python tests/support/fuzz_checkpoint.py --inputs 200000
    python tests/support/fuzz_checkpoint.py --inputs 20000 --reader transformers    (or vllm)

Every input is one mutation (``fuzz_mutations``) of a small checkpoint of random rows, repeatable by its
number (``--first N --inputs 1``). Mutations alter headers, offsets, the index, config.json, the manifest, and
values of packed tensors with the hashes of the manifest written anew, so that checks behind the hashes are
reached.

What is accepted is read, decoded and run through the kernels: rows must fill the payload exactly, all values
must be finite, and all tensors must be those of the unaltered checkpoint, unless the mutation was one of
config.json or of values with their hashes. Anything else than one of our errors is a failure: another
exception (of ours: loaders have errors of their own for what they read before they ask us), a crash, more
than ``SECONDS`` for an input, more than ``MEMORY`` bytes for the process.
"""

from __future__ import annotations

import argparse
import faulthandler
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fuzz_mutations import Input, Mutations
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import bitsmoe_plugin
import vllm_ext
from bitsmoe_plugin.checkpoint.manifest import tensor_digest
from bitsmoe_plugin.checkpoint.packed_files import PackedFiles
from bitsmoe_plugin.checkpoint.read import read_config
from bitsmoe_plugin.codec import layout
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.codec.sharding import whole
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.commands.inspect import inspect_checkpoint
from bitsmoe_plugin.errors import BitsMoEError
from bitsmoe_plugin.models.files import safetensors_files
from bitsmoe_plugin.runtime import dispatch
from bitsmoe_plugin.runtime.experts import BitsMoEExperts

SECONDS = 5.0
"""Of computing; ten times as much of waiting, because other processes may have the machine."""
MEMORY = 3 * 2**30
"""Beyond what the process has mapped at the start."""
SAME, OTHER = "accepted, the same", "accepted, another"


@dataclass(frozen=True)
class Read:
    """What a reader has made of a checkpoint: sizes and packed tensors of each layer, and all others."""

    layers: list[tuple[PackedSpec, PackedExperts]]
    others: dict[str, torch.Tensor]


def _others(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {n: t for path in safetensors_files(folder) for n, t in load_file(path).items()}
    return {name: tensor for name, tensor in tensors.items() if ".bitsmoe_" not in name}


def read_core(folder: Path) -> Read:
    """As `bitsmoe inspect`."""
    inspect_checkpoint(folder)
    files = PackedFiles.open(safetensors_files(folder), read_config(folder))
    return Read([(spec, files.read(name)) for name, spec in files.specs.items()], _others(folder))


def read_transformers(folder: Path) -> Read:
    """Loads the model and runs it once."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model(torch.arange(8)[None])
    modules = [module for module in model.modules() if isinstance(module, BitsMoEExperts)]
    others = {name: t for name, t in model.state_dict().items() if ".bitsmoe_" not in name}
    return Read([(module.spec, module.packed()) for module in modules], others)


def read_vllm(folder: Path) -> Read:
    """What vLLM asks of us: before it makes a model, and layer by layer."""
    from vllm_ext.config import BitsMoEServingConfig
    from vllm_ext.weight_loading import load_shard

    model = AutoConfig.from_pretrained(folder)
    config = BitsMoEServingConfig.from_config(model.quantization_config)
    config.maybe_update_config(str(folder), model)
    layers = []
    for name, spec in config.files.specs.items():
        shard, tensors = load_shard(config.files, name, whole(spec.shape), torch.device("cpu"))
        layers.append((shard, PackedExperts(**{b.removeprefix("bitsmoe_"): t for b, t in tensors.items()})))
    return Read(layers, _others(folder))


READERS: dict[str, Callable[[Path], Read]] = {
    "core": read_core,
    "transformers": read_transformers,
    "vllm": read_vllm,
}
# Kinds of mutations that leave config.json and what it says of the tensors as they were.
_PROTECTED = ("header", "length", "cut", "data", "index", "shards")
_OURS = tuple(str(Path(module.__file__).parent) for module in (bitsmoe_plugin, vllm_ext))


class Fuzzer:
    """Makes inputs by number and judges them.

    Args:
        folder: where they are written.
        reader: one of ``READERS``.
    """

    def __init__(self, folder: Path, reader: str) -> None:
        self.folder = folder
        self.mutations = Mutations()
        self.reader = READERS[reader]
        self.sound: set[tuple[PackedSpec, str]] = set()  # layers that were checked, unaltered as a rule
        self.wanted = []
        for number in range(len(self.mutations.bases)):
            self._write(self.mutations.unaltered(number))
            self.wanted.append(self.reader(folder))

    def run(self, number: int) -> tuple[str, str]:
        """(kind, result) of one input: ``SAME``, ``OTHER`` or the class of the error.

        Raises:
            Exception: anything that is not one of our errors, nor one of a loader's own, is a failure.
        """
        kind, made = self.mutations.input(number)
        self._write(made)
        try:
            found = self.reader(self.folder)
        except BitsMoEError as error:
            return kind, type(error).__name__
        except (MemoryError, TimeoutError):
            raise
        except Exception as error:
            frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
            ours = any(name.startswith(_OURS) for name in frames)
            if self.reader is read_core or ours or "DefaultCPUAllocator" in str(error):
                raise
            return kind, "a loader's own"
        for spec, packed in found.layers:
            self._check_layer(spec, packed)
        same = self._is_same(found, self.wanted[number % len(self.wanted)])
        assert same or not kind.startswith(_PROTECTED), f"{kind} was accepted"
        return kind, SAME if same else OTHER

    def _write(self, made: Input) -> None:
        for path in self.folder.iterdir():
            path.unlink()
        (self.folder / "config.json").write_bytes(made.config)
        for name, data in made.files.items():
            (self.folder / name).write_bytes(data)
        for name, target in made.links.items():
            (self.folder / name).symlink_to(target)

    @staticmethod
    def _is_same(found: Read, wanted: Read) -> bool:
        """Sizes and all tensors."""
        specs = [spec for spec, _ in found.layers] == [spec for spec, _ in wanted.layers]
        if not specs or found.others.keys() != wanted.others.keys():
            return False
        pairs = [(tensor, wanted.others[name]) for name, tensor in found.others.items()]
        for (_, packed), (_, original) in zip(found.layers, wanted.layers, strict=True):
            pairs += [(a, b) for (_, a), (_, b) in zip(packed.tensors(), original.tensors(), strict=True)]
        return all(torch.equal(tensor, original) for tensor, original in pairs)

    def _check_layer(self, spec: PackedSpec, packed: PackedExperts) -> None:
        """A layer that was accepted is sound: rows fill the payload, every value is finite, kernels run."""
        known, shape = (spec, tensor_digest(packed)), spec.shape
        if known in self.sound:
            return
        index = layout.index_rows(packed.row_codes, spec.widths, shape)
        assert index.words == packed.payload.numel()
        assert torch.equal(index.order.sort(-1).values, torch.arange(shape.rank).expand_as(index.order))
        for words, scales, columns in (
            (packed.input_basis, packed.input_scales, shape.hidden_size),
            (packed.output_basis, packed.output_scales, shape.rank),
        ):
            basis = layout.unpack_basis(words, scales, spec.basis_bits, columns, spec.grid)
            assert basis.isfinite().all(), "a basis is not finite"
        self._check_rows(spec, packed, index)
        ids = torch.arange(shape.num_experts)[:, None]
        runtime = dispatch.prepare(spec, packed, lambda gate, up: gate.sigmoid() * up)
        out = runtime.forward(torch.ones(len(ids), shape.hidden_size), ids, torch.ones(len(ids), 1))
        assert out.shape == (len(ids), shape.hidden_size)
        self.sound.add(known)

    @staticmethod
    def _check_rows(spec: PackedSpec, packed: PackedExperts, index: layout.RowIndex) -> None:
        size = spec.shape.intermediate_size
        scales = None if spec.is_tiled else layout.row_scales(packed.row_codes, packed.scale_grid)
        for factor in range(3):
            for expert in range(spec.shape.num_experts):
                if scales is None:
                    rows = layout.unpack_tiled_rows(packed, index, factor, expert, size)[0]
                    # Products of two finite float16 may be infinite there; they are what was stored.
                    assert not rows.isnan().any(), "a row is NaN"
                else:
                    rows = layout.unpack_rows(packed.payload, index, scales, factor, expert, size, spec.grid)[
                        0
                    ]
                    assert rows.isfinite().all(), "a row is not finite"


def _too_slow(signal_number: int, _frame: Any) -> None:
    what = "computing" if signal_number == signal.SIGPROF else "waiting"
    raise TimeoutError(f"an input took too long ({what})")


def _limit_time(seconds: float) -> None:
    """Of the input that begins now; 0 ends the limit."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)


def limit_memory() -> None:
    """Let this process map ``MEMORY`` more than it has."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))


def fuzz(
    first: int, inputs: int, seconds: float = float("inf"), reader: str = "core"
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Run inputs by number until there are enough or the time is up.

    Returns:
        (kind, result) -> inputs; and what failed, with its number.
    """
    counts: Counter[tuple[str, str]] = Counter()
    failures: list[str] = []
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="bitsmoe-fuzz-", dir=memory if memory.is_dir() else None))
    end = time.monotonic() + seconds
    before = [(number, signal.signal(number, _too_slow)) for number in (signal.SIGALRM, signal.SIGPROF)]
    try:
        fuzzer = Fuzzer(folder, reader)
        for number in range(first, first + inputs):
            if time.monotonic() > end:
                break
            _limit_time(SECONDS)
            try:
                counts[fuzzer.run(number)] += 1
            except BaseException as error:  # a panic of safetensors is no Exception
                if isinstance(error, (KeyboardInterrupt, SystemExit)):
                    raise
                failures.append(f"input {number}: {type(error).__name__}: {str(error)[:300]}")
                print(failures[-1], file=sys.stderr, flush=True)
            finally:
                _limit_time(0)
            if number % 5000 == 4999:
                print(f"{number + 1 - first} inputs, {len(failures)} failures", file=sys.stderr, flush=True)
    finally:
        for number, handler in before:
            signal.signal(number, handler)
        shutil.rmtree(folder)
    return counts, failures


def main() -> int:
    """Print a table of kinds and results; the status is 1 if any input failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--reader", choices=READERS, default="core")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    faulthandler.enable()
    torch.set_num_threads(1)
    limit_memory()
    start = time.monotonic()
    counts, failures = fuzz(args.first, args.inputs, reader=args.reader)
    took = time.monotonic() - start
    results = sorted({result for _, result in counts})
    print(f"{'kind':24}" + "".join(f"{result:>20}" for result in results))
    for kind in sorted({kind for kind, _ in counts}):
        print(f"{kind:24}" + "".join(f"{counts[kind, result]:20}" for result in results))
    accepted = {name: sum(n for (_, result), n in counts.items() if result == name) for name in (SAME, OTHER)}
    done, hangs = sum(counts.values()), sum("TimeoutError" in failure for failure in failures)
    print(
        f"{done + len(failures)} inputs: {done - sum(accepted.values())} refused, {accepted[SAME]} accepted "
        f"with the same tensors, {accepted[OTHER]} as another sound checkpoint, {len(failures)} failures "
        f"({hangs} of them hangs); {took:.0f} s, {args.inputs / took:.0f} per second"
    )
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
