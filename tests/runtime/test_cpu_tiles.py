"""Tile instructions (AMX), by the model of them in C: what they compute is what AVX-512 does, bit by bit.

No machine that this was written on has the instructions: how fast they are, and that the model is like them,
is not tested here. Where the CPU has them, they are compared, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import c_int64

import pytest
import torch
from torch import Tensor

from bitsmoe_plugin.base import native
from bitsmoe_plugin.codec.layout import LayerShape
from bitsmoe_plugin.commands.bench.synthetic import random_layer
from bitsmoe_plugin.commands.environment import environment
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.models.gating import gating
from bitsmoe_plugin.presets import ALL_WIDTHS
from bitsmoe_plugin.runtime import cpu_layer

LEAST_VECTORS = 8
MOST_VECTORS = 512
CASES = {
    "ragged rows": (LayerShape(3, 96, 200), {}),
    "uniform grid": (LayerShape(2, 80, 130), {"grid": "uniform", "basis_group_size": 16}),
    "two steps of a lane": (LayerShape(1, 64, 2048), {"widths": (2, 8), "shares": (1, 1)}),
    "two panels": (LayerShape(1, 64, 2080), {"widths": (1, 3), "shares": (1, 1)}),
    "bases of 8 bits": (LayerShape(2, 192, 65), {"basis_bits": 8, "basis_group_size": 64, "input_bases": 2}),
    "one block": (LayerShape(2, 128, 31), {"basis_group_size": 128}),
}


@pytest.fixture(params=["model", "amx"], autouse=True)
def tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    if native.select("avx512") is None:
        pytest.skip("this machine has no avx512")
    if native.select_tiles(request.param) != request.param:
        pytest.skip(f"this machine has no {request.param}")
    threads = torch.get_num_threads()
    yield request.param
    torch.set_num_threads(threads)
    native.select(None)


def routing(tokens: int, experts: int) -> tuple[Tensor, Tensor]:
    """Some experts with many tokens, one with almost none, slots that go elsewhere."""
    ids = torch.multinomial(torch.logspace(-2, 0, experts + 1), 2 * tokens, replacement=True).view(tokens, 2)
    return torch.where(ids == experts, -1, ids), torch.rand(tokens, 2)


def products() -> int:
    """Products of tiles that the model has made."""
    return c_int64.in_dll(native.library(), "bitsmoe_model_products").value


def compare(layer: cpu_layer.CpuLayer, tiles: str, inputs: tuple[Tensor, ...], planes: int) -> int:
    """Asserts equality; returns the number of products that tiles made."""
    wanted, out = torch.empty_like(inputs[0]), torch.empty_like(inputs[0])
    assert native.select_tiles("none") == "none"
    before = products()
    layer._forward(*inputs, wanted, planes)
    assert products() == before
    assert native.select_tiles(tiles) == tiles
    layer._forward(*inputs, out, planes)
    assert bool(torch.isfinite(wanted).all())
    assert torch.equal(out, wanted), f"{len(out)} tokens"
    return products() - before


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("planes", [1, 2])
def test_tiles_compute_what_vectors_do(case: str, planes: int, tiles: str) -> None:
    """Guards blocks with fewer tokens than a tile has rows, rows that fill no tile, tails of columns, several
    panels and steps, experts with few tokens or none, and the order of float sums."""
    torch.manual_seed(0)
    shape, options = CASES[case]
    spec, packed = random_layer(shape, **{"widths": ALL_WIDTHS, "shares": [1] * len(ALL_WIDTHS), **options})
    layer = cpu_layer.CpuLayer.prepare(spec, packed, gating("silu"))
    counts = [1, *range(LEAST_VECTORS - 1, 19), 31, 32, 33, 47, 64, 65, 70]
    for number, tokens in enumerate(counts):
        torch.set_num_threads(1 + number % 3)
        inputs = (torch.randn(tokens, shape.hidden_size), *routing(tokens, shape.num_experts))
        made = compare(layer, tiles, inputs, planes)
        assert made > 0 or tokens < LEAST_VECTORS or tiles != "model"


def test_many_tokens_on_one_expert(tiles: str) -> None:
    """More than are held for down at a time."""
    spec, packed = random_layer(LayerShape(1, 32, 33), widths=(2,), shares=[1])
    layer = cpu_layer.CpuLayer.prepare(spec, packed, gating("silu"))
    tokens = MOST_VECTORS + 5
    inputs = (torch.randn(tokens, 32), torch.zeros(tokens, 1, dtype=torch.long), torch.ones(tokens, 1))
    compare(layer, tiles, inputs, 1)


def test_other_instruction_sets_have_no_tiles() -> None:
    native.select("portable")
    assert native.select_tiles("model") is None
    assert native.select_tiles(None) == "none"


def test_environment_says_whether_they_are_used(monkeypatch) -> None:
    for state, text in (("amx", "and AMX-INT8"), ("refused", "refuses its use")):
        monkeypatch.setattr(native, "select_tiles", lambda name, state=state: state)
        assert text in environment()["kernels"]
    monkeypatch.setattr(native, "select_tiles", lambda name: "none")
    assert environment()["kernels"] == "AVX-512"


@pytest.fixture
def _loaded_anew() -> Iterator[None]:
    """The environment is read when the library is loaded."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.usefixtures("_loaded_anew")
def test_they_can_be_switched_off(monkeypatch) -> None:
    """Where the system is not even asked for them."""
    with monkeypatch.context() as context:
        context.setenv(native.AMX, "0")
        assert native.select_tiles(None) == "none"
        assert native.select_tiles("amx") is None
    native.library.cache_clear()
    native.library()  # allows them again


@pytest.mark.usefixtures("_loaded_anew")
def test_another_switch_is_refused(monkeypatch) -> None:
    """It must not be taken for one of the two."""
    with monkeypatch.context() as context:
        context.setenv(native.AMX, "off")
        with pytest.raises(ConfigError, match="BITSMOE_AMX='off' is neither 0 nor 1"):
            native.library()
    native.library()
