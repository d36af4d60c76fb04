"""The last launch of ``decode``: rows of down for each pair, and the output basis times their sums.

The output basis needs all that down gives, and would be a launch after it. Instead the first programs compute
down and count themselves when they are done, and a few more, which load their first words of the basis
meanwhile, wait for the count. What waits must not keep out what it waits for: there are at most as many that
wait as the GPU has processors, each of which holds two programs of 128 threads, whatever their registers.

``matvec.scaled`` sets the count to 0, so that nothing has to be reset, a CUDA graph can be replayed, and
calls on several streams do not meet. The count orders programs and enters no sum: each has a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitsmoe_plugin.base.triton_launch import Launch, Launcher
from bitsmoe_plugin.runtime.triton.basis import PackedBasis
from bitsmoe_plugin.runtime.triton.decode_down import down_part
from bitsmoe_plugin.runtime.triton.matvec import basis_products, basis_words
from bitsmoe_plugin.runtime.triton.state import LayerState
from bitsmoe_plugin.runtime.triton.target import Target


def outputs(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    basis: PackedBasis,
    arrived: Tensor,
    dtype: torch.dtype,
    state: LayerState,
    target: Target,
    launch: Launcher,
) -> Tensor:
    """``[T, H]`` of ``dtype``: the output of the experts, weighted and summed; 0 for slots of no expert.

    Args:
        hidden: ``[T * k, 32 * blocks]`` float32, see ``decode.hidden_units``.
        ids: ``[T, k]`` integer; what is not one of the experts contributes nothing.
        weights: ``[T, k]``.
        basis: ``[H, r]``.
        arrived: ``[1]`` int32, 0.
    """
    (tokens, slots), sizes, pairs = ids.shape, target.blocks, ids.numel()
    blocks, warps = _widest(state.blocks), sizes.decode_warps[1]
    rows, (basis_rows, words) = max(1, 32 * warps // blocks), sizes.basis_out
    wanted = triton.cdiv(target.processors * sizes.programs_per_processor, pairs)
    splits = max(1, min(wanted, triton.cdiv(state.rank, rows)))
    tiles = tokens * triton.cdiv(len(basis.codes), basis_rows)
    waiting = triton.cdiv(tiles, triton.cdiv(tiles, target.processors))
    out = hidden.new_empty((tokens, len(basis.codes)), dtype=dtype)
    parts = hidden.new_empty((pairs, state.rank))
    arguments = {"pairs": pairs, "splits": splits, "hidden": hidden, "ids": ids, "weights": weights}
    arguments |= {
        "parts": parts,
        "arrived": arrived,
        "codes": basis.codes,
        "scales": basis.scales,
        "out": out,
    }
    arguments |= {**state.pointers(), **state.scale_pointers(), "tables": state.tables}
    constants = {**state.constants(), **basis.constants(), "UNITS": state.units, "SLOTS": slots}
    constants |= {"ROWS": rows, "BLOCKS": blocks, "TILES": triton.cdiv(state.blocks, blocks)}
    constants |= {"BASIS_ROWS": basis_rows, "BASIS_WORDS": words}
    launch(
        Launch(
            kernel=output_kernel,
            launch_grid=(pairs * splits + waiting,),
            arguments=arguments,
            constants=constants,
            num_warps=warps,
        )
    )
    return out


def _widest(blocks: int) -> int:
    """The power of two up to 32 that leaves the fewest lanes idle, the largest of several."""
    return min((2**i for i in range(6)), key=lambda n: (-(-blocks // n) * n, -n))


@triton.jit
def output_kernel(
    hidden,
    ids,
    weights,
    parts,
    arrived,
    codes,
    scales,
    out,
    payload,
    starts,
    counts,
    tile_scales,
    row_starts,
    tables,
    order,
    row_codes,
    scale_grid,
    pairs,
    splits,
    EXPERTS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    GRID: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    TOTAL_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    SLOTS: tl.constexpr,
    BASIS_ROWS: tl.constexpr,
    BASIS_WORDS: tl.constexpr,
):
    """``outputs``. Grid: ``splits`` parts of the rows of down, of all pairs the first first, because only the
    last may be empty; then programs for the basis."""
    program, down = tl.program_id(0), pairs * splits
    if program < down:
        down_part(
            hidden,
            ids,
            weights,
            parts,
            payload,
            starts,
            counts,
            tile_scales,
            row_starts,
            tables,
            order,
            row_codes,
            scale_grid,
            program % pairs,
            program // pairs,
            splits,
            EXPERTS,
            INPUTS,
            RANK,
            ROW_BLOCKS,
            WIDTHS,
            GRID,
            UNITS,
            ROWS,
            BLOCKS,
            TILES,
        )
        tl.debug_barrier()  # of all threads: one of them releases what all have written
        tl.atomic_add(arrived, 1, sem="release")
    else:
        _basis(
            parts,
            arrived,
            codes,
            scales,
            out,
            program - down,
            tl.num_programs(0) - down,
            pairs // SLOTS,
            down,
            TOTAL_ROWS,
            COLUMNS,
            ROW_WORDS,
            GROUP,
            BITS,
            STEP,
            SLOTS,
            BASIS_ROWS,
            BASIS_WORDS,
        )


@triton.jit
def _basis(
    parts,
    arrived,
    codes,
    scales,
    out,
    program,
    programs,
    tokens,
    down,
    TOTAL_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Every so many tiles of rows of the basis, for a token each, times the sum of its parts over slots."""
    EACH: tl.constexpr = 1 if BITS == 16 else 32 // BITS
    STEPS: tl.constexpr = (ROW_WORDS + WORDS - 1) // WORDS
    lane, element = tl.arange(0, ROWS), tl.arange(0, WORDS)
    row = program // tokens * ROWS + lane
    packed, scale = basis_words(
        codes, scales, row, element, row < TOTAL_ROWS, COLUMNS, ROW_WORDS, GROUP, BITS
    )
    while tl.atomic_add(arrived, 0, sem="acquire") < down:
        pass
    tiles = tokens * ((TOTAL_ROWS + ROWS - 1) // ROWS)
    total = tl.zeros([ROWS, WORDS], tl.float32)
    for step in range(0, tl.cdiv(tiles - program, programs) * STEPS):
        tile = program + step // STEPS * programs
        following = program + (step + 1) // STEPS * programs
        row = following // tokens * ROWS + lane
        word = (step + 1) % STEPS * WORDS + element
        packed_ahead, scale_ahead = basis_words(
            codes, scales, row, word, row < TOTAL_ROWS, COLUMNS, ROW_WORDS, GROUP, BITS
        )
        column = step % STEPS * (WORDS * EACH) + tl.arange(0, WORDS * EACH)
        vector = tl.zeros([WORDS * EACH], tl.float32)
        for slot in tl.static_range(SLOTS):
            at = parts + (tile % tokens * SLOTS + slot) * COLUMNS + column
            vector += tl.load(at, mask=column < COLUMNS, other=0.0)
        total += basis_products(packed, scale, vector, BITS, STEP)
        if step % STEPS == STEPS - 1:
            row = tile // tokens * ROWS + lane
            tl.store(out + tile % tokens * TOTAL_ROWS + row, tl.sum(total, 1), mask=row < TOTAL_ROWS)
            total = tl.zeros([ROWS, WORDS], tl.float32)
        packed, scale = packed_ahead, scale_ahead
