"""Checkpoints that the method's authors released, converted into the packed layout without rounding.

Their format, as their public inference code reads and writes it (repository zjiayu064/BitsMoE, MIT licence;
"release" is its commit 8b2b52d, "update" 51e17a3). Nothing of that code is copied. Symbols: H hidden_size,
I intermediate_size (a multiple of 32), r rank of a basis, n stored rows of a projection.

**Model** (``bitsmoe_auto_patch.py``, ``bitsmoe_vllm/placement.py``). safetensors with the tensor names of the
base model, but for the routed experts; config.json is the base model's with ``bitsmoe: true`` and
``bitsmoe_model_type`` (qwen3moe, qwen3next, deepseekv2). The activation is SiLU.

**Bases** of a layer, in ``<moe>.``: z = V x for gate and up, y = U c for down (``base_block.py``).

* Release: ``shared_vh_gate_proj``, ``shared_vh_up_proj`` float16 ``[r, H]``, ``shared_u_down`` ``[H, r]``.
* Update: each is ``<name>_qweight`` int32 ``[K / 16, 4 N]`` and ``<name>_scales`` float16 ``[K / 128, N]``,
  in the layout of vLLM's GPTQ-Marlin kernel for 8 bits; see ``bases``. It is the matrix ``[N, K]``: of gate
  and up N = r, K = H; of down N = H, K = r. Its values are float16((code - 128) * scale), as the kernels
  round them. Tensors of the release's names are ignored if they are empty.

**Experts**, in ``<moe>.experts.<e>.<p>_``, p in gate, up, down (``base_mlp.py``, ``packer.py``). Row k of the
factor of p, which has one value per neuron, is

    float16(q[k, i] * scale[i // 128, k]) * s[k]

and meets coordinate ``rank_idx[k]`` of z (gate, up) or c (down). (``dequantize_symmetric``,
``triton_moe.py``; of the release's ``mlp_forward.cu`` the kernels for few tokens do not round the product to
float16. s is multiplied into the coordinate before, or the sum after.) Rows come in slabs of one width:

* ``payload_buffer`` uint32: slab after slab, tile of 128 neurons after tile, stage of 16 rows after stage
  (the last may have fewer), 32 neurons after 32 (four, also in a last tile that has fewer), row after row,
  word after word. A row's 32 values at b bits are b words: bit i of word p is bit p of value i's code u;
  q = u - 2^(b-1), or 2u - 1 at one bit. At 16 bits they are 16 words of two float16 each, the first in the
  low half, which are the values themselves: their scale is not used, and stored as 1.
* ``slab_meta_buffer`` ``[slabs, 4]``: width (1, 2, 3, 4, 6, 8, 16), rows, first row, first tile.
* ``tile_meta_buffer`` ``[tiles, 3]``: first payload word, first scale, neurons (128 but for the last).
* ``rank_idx_buffer`` int32 ``[n]``, ``s_buffer`` float16 ``[n]``; ``scale_buffer`` float16: slab after slab,
  tile after tile, row after row.
* Beside them, implied by the others: ``segments`` ``[widths, 3]`` (width, first row, row after the last),
  ``original_indices`` (rank_idx again), ``original_rank`` (at most r), ``groupsize`` (128).

The packer drops rows of width 0. An expert one of whose projections has no rows adds nothing (update).
Experts that the release computes unpacked ("super experts", a table in its code) are ordinary
``<p>_proj.weight``.

**Assumed**, because no released file could be looked at. A file that says otherwise is refused; the last
point cannot be seen from files:

1. The files hold what the code's modules register: the names above, int32 (or, as its packer writes them,
   int16) metadata, uint32 payload, no pickled files.
2. Slabs, tiles and scales follow each other without gaps, as the packer lays them out. Its readers would
   follow any offsets.
3. ``segments``, ``original_indices``, ``original_rank`` and ``groupsize`` may be absent (only one of two
   readers needs them), but not contradict the rest.
4. All layers have bases of the same kind, and no rank is larger than H.
5. Unpacked experts need not be those of the release's table; which they are is seen from the files. They
   have the same dtype.
6. The base model's class in transformers computes what the authors' copy of it does; ``auto_map`` and
   remote code are dropped.
"""
