"""The GPTQ reader against an encoder written bit by bit from the format's description."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bitsmoe_plugin.commands.compare.compare import compare
from bitsmoe_plugin.commands.compare.gptq_checkpoint import (
    count_quantized_experts,
    dequantize_gptq_linear,
    dequantized_state_dict,
    expert_bytes,
    fuse_experts,
    is_gptq,
    load_gptq_model,
    other_bytes,
)
from bitsmoe_plugin.commands.compare.method import run_method
from bitsmoe_plugin.commands.compare.task import ComparisonTask
from bitsmoe_plugin.commands.evaluate import evaluate_path
from bitsmoe_plugin.errors import CheckpointError, ConfigError


def _pack_bits(values: list[int], bits: int) -> list[int]:
    """Write values one after another, lowest bit first, into signed 32-bit words."""
    stream = [(value >> position) & 1 for value in values for position in range(bits)]
    words = []
    for start in range(0, len(stream), 32):
        word = sum(bit << position for position, bit in enumerate(stream[start : start + 32]))
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


def _store_zero_row(zeros: list[int], bits: int, checkpoint_format: str) -> list[int]:
    """Pack one group's zero points; "gptq" takes one from each field.

    For 2, 4 and 8 bits it does so with one subtraction per word, borrows included.
    """
    if checkpoint_format == "gptq_v2":
        return _pack_bits(zeros, bits)
    if bits == 3:
        return _pack_bits([(zero - 1) % 8 for zero in zeros], bits)
    ones = int(("0" * (bits - 1) + "1") * (32 // bits), 2)
    words = [(word - ones) % 2**32 for word in _pack_bits(zeros, bits)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def _encode(
    codes: list[list[int]], zeros: list[list[int]], scales: torch.Tensor, g_idx: list[int],
    bits: int, checkpoint_format: str,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Encode codes[in][out], zeros[group][out] to the four stored tensors."""
    columns = [_pack_bits([row[out] for row in codes], bits) for out in range(len(codes[0]))]
    rows = [_store_zero_row(row, bits, checkpoint_format) for row in zeros]
    return {
        "qweight": torch.tensor(columns, dtype=torch.int32).T.contiguous(),
        "qzeros": torch.tensor(rows, dtype=torch.int32),
        "scales": scales,
        "g_idx": torch.tensor(g_idx, dtype=torch.int32),
    }


def _random_layer(
    seed: int, bits: int, inputs: int, outputs: int, groups: int, ordered: bool = False
) -> dict[str, Any]:
    """Random codes, zero points (0 included), exact binary scales and group indices."""
    random = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=random)

    g_idx = draw(0, groups, inputs)
    if ordered:
        g_idx = torch.arange(inputs) * groups // inputs
    return {
        "codes": draw(0, 2**bits, inputs, outputs).tolist(),
        "zeros": draw(0, 2**bits, groups, outputs).tolist(),
        "scales": (draw(1, 2048, groups, outputs) / 1024).half(),
        "g_idx": g_idx.tolist(),
    }


def _dense(layer: dict[str, Any]) -> torch.Tensor:
    """Return W[out][in] = scale * (code - zero), element by element, in Python floats.

    Every scale has 11 significant bits and every difference at most 9: float32 is exact.
    """
    codes, zeros, g_idx = layer["codes"], layer["zeros"], layer["g_idx"]
    scales = layer["scales"].tolist()
    return torch.tensor(
        [
            [
                scales[g_idx[i]][o] * (codes[i][o] - zeros[g_idx[i]][o])
                for i in range(len(codes))
            ]
            for o in range(len(codes[0]))
        ]
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([2, 3, 4, 8]),
    input_words=st.integers(1, 3),
    output_words=st.integers(1, 3),
    groups=st.integers(1, 5),
    checkpoint_format=st.sampled_from(["gptq", "gptq_v2"]),
)
def test_reader_inverts_the_encoder_exactly(
    seed: int, bits: int, input_words: int, output_words: int, groups: int, checkpoint_format: str
) -> None:
    """Guards: bit order, 3-bit straddling, zero-point offset with borrows, desc_act groups."""
    layer = _random_layer(seed, bits, 32 * input_words, 32 * output_words, groups)
    stored = _encode(**layer, bits=bits, checkpoint_format=checkpoint_format)
    weight = dequantize_gptq_linear(**stored, bits=bits, checkpoint_format=checkpoint_format)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, _dense(layer))


def test_known_three_bit_words() -> None:
    """Guards the encoder itself: the word values are worked out by hand.

    Only value 10 (bits 30..32) is 7: two bits in word 0, one in word 1.
    """
    assert _pack_bits([0] * 10 + [7] + [0] * 21, 3) == [-(2**30), 1, 0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_narrow_layers_need_not_have_a_multiple_of_32_outputs(bits: int) -> None:
    """Guards against assuming 32 values where one word holds 32 / bits of them."""
    layer = _random_layer(5, bits, 64 // bits, 32 // bits, 2)
    stored = _encode(**layer, bits=bits, checkpoint_format="gptq")
    weight = dequantize_gptq_linear(**stored, bits=bits, checkpoint_format="gptq")
    assert torch.equal(weight, _dense(layer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "5-bit"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"qweight": torch.zeros(3, 32, dtype=torch.int32)}, "expected"),
        ({"qzeros": torch.zeros(2, 2, dtype=torch.int64)}, "int32"),
        ({"g_idx": torch.full((32,), 2, dtype=torch.int32)}, "g_idx has groups 2 to 2"),
        ({"g_idx": torch.full((32,), -1, dtype=torch.int32)}, "g_idx has groups -1 to -1"),
        ({"g_idx": torch.zeros(0, dtype=torch.int32)}, "0 inputs"),
    ],
)
def test_inconsistent_tensors_are_refused(change: dict[str, Any], message: str) -> None:
    """Guards against dequantizing parts that do not belong together to plausible noise."""
    stored = _encode(**_random_layer(0, 2, 32, 32, 2), bits=2, checkpoint_format="gptq")
    arguments = {**stored, "bits": 2, "checkpoint_format": "gptq", **change}
    with pytest.raises(CheckpointError, match=message):
        dequantize_gptq_linear(**arguments)


def _tiny_config() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=2, num_experts_per_tok=1, tie_word_embeddings=False,
    )  # fmt: skip


def _write_checkpoint(directory: Path, bits: int = 3) -> dict[str, torch.Tensor]:
    """Write a 2-layer Qwen3-MoE in two shards, experts in GPTQ form; return the dense weights.

    A quantized layer's four tensors are spread over both shards.
    """
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = _tiny_config()
    plain = Qwen3MoeForCausalLM(config).state_dict()
    dense = {name: value for name, value in plain.items() if ".experts." not in name}
    stored = {name: value.clone() for name, value in dense.items()}
    for index in range(2 * 2 * 3):
        layer, expert, kind = index // 6, index // 3 % 2, ("gate", "up", "down")[index % 3]
        prefix = f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj"
        random_layer = _random_layer(index, bits, 32, 32, 1, ordered=True)
        dense[f"{prefix}.weight"] = _dense(random_layer)
        parts = _encode(**random_layer, bits=bits, checkpoint_format="gptq")
        stored.update({f"{prefix}.{part}": value for part, value in parts.items()})
    names = sorted(stored)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: stored[name] for name in members}, directory / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    index_file = directory / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    settings_ = {"quant_method": "gptq", "bits": bits, "group_size": -1}
    config_json = {**config.to_dict(), "architectures": ["Qwen3MoeForCausalLM"]}
    config_json["quantization_config"] = settings_
    (directory / "config.json").write_text(json.dumps(config_json))
    return dense


def test_state_dict_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    """Guards against losing tensors between shards, and against a config without the format."""
    dense = _write_checkpoint(tmp_path)
    read = dict(dequantized_state_dict(tmp_path))
    assert read.keys() == dense.keys()
    assert all(torch.equal(read[name], dense[name]) for name in dense)


def test_expert_bytes_counts_zero_points_and_scales(tmp_path: Path) -> None:
    """Guards against flattering GPTQ (or us): every byte that a loader needs counts, no other."""
    _write_checkpoint(tmp_path)
    qweight, qzeros, scales = 32 * 32 * 3 // 8, 32 * 3 // 8, 32 * 2
    assert expert_bytes(tmp_path) == 2 * 2 * 3 * (qweight + qzeros + scales)


@pytest.mark.parametrize("tied", [False, True])
def test_other_bytes_are_those_outside_the_experts(tied: bool, tmp_path: Path) -> None:
    """Guards against totals that leave attention out, or count a head twice that is the embeddings."""
    dense = _write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    others = sum(value.nbytes for name, value in dense.items() if ".experts." not in name)
    assert other_bytes(tmp_path) == others - tied * dense["lm_head.weight"].nbytes


def test_loaded_model_has_exactly_the_dense_weights(tmp_path: Path) -> None:
    """Guards against experts that silently keep random values (fused parameters)."""
    dense = _write_checkpoint(tmp_path)
    model = load_gptq_model(tmp_path, torch.float32)
    experts = model.model.layers[1].mlp.experts
    prefix = "model.layers.1.mlp.experts.1"
    assert torch.equal(experts.down_proj[1], dense[f"{prefix}.down_proj.weight"])
    gate_up = [dense[f"{prefix}.{kind}_proj.weight"] for kind in ("gate", "up")]
    assert torch.equal(experts.gate_up_proj[1], torch.cat(gate_up))
    assert torch.equal(model.model.embed_tokens.weight, dense["model.embed_tokens.weight"])
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize(
    "lost",
    [
        "layers.0.mlp.experts.1.up_proj.g_idx",
        "layers.0.mlp.experts.1.up_proj.",
        "layers.0.mlp.experts.1.",
        "layers.1.mlp.experts.",
        "layers.1.mlp.gate.weight",
    ],
)
def test_incomplete_checkpoints_are_refused(tmp_path: Path, lost: str) -> None:
    """Guards against evaluating a model with a missing, hence random, expert."""
    _write_checkpoint(tmp_path)
    for file in ("a.safetensors", "b.safetensors"):
        kept = {name: value for name, value in load_file(tmp_path / file).items() if lost not in name}
        save_file(kept, tmp_path / file)
    with pytest.raises(CheckpointError):
        load_gptq_model(tmp_path, torch.float32)


@pytest.mark.parametrize("extra", ["model.layers.0.mlp.experts.0.w.weight", "lm_head.qweight"])
def test_only_experts_and_all_of_them_must_be_quantized(tmp_path: Path, extra: str) -> None:
    """Guards against a baseline that kept some experts dense, or also quantized attention."""
    _write_checkpoint(tmp_path)
    assert count_quantized_experts(tmp_path) == 2 * 2 * 3
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({extra: torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=extra):
        count_quantized_experts(tmp_path)


def test_all_layers_means_more_than_the_experts(tmp_path: Path) -> None:
    """Guards against a peer of the whole model that quantized its experts alone."""
    _write_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="nothing but routed experts"):
        count_quantized_experts(tmp_path, all_layers=True)
    (tmp_path / "mixtral").mkdir()
    _write_autogptq_mixtral(tmp_path / "mixtral")  # attention too
    assert count_quantized_experts(tmp_path / "mixtral", all_layers=True) == 2 * 3


def test_other_quantization_methods_are_refused(tmp_path: Path) -> None:
    """Guards against reading AWQ's packing, whose order differs, as GPTQ."""
    config = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="awq"):
        dict(dequantized_state_dict(tmp_path))


def test_split_experts_are_fused_for_families_with_other_names() -> None:
    """Mixtral's own names are w1, w2, w3, so transformers would not fuse what quantizers save."""
    path, e, i, h = "model.layers.0.block_sparse_moe.experts", 3, 4, 6
    shapes = {"gate": (i, h), "up": (i, h), "down": (h, i)}
    split = {
        f"{path}.{n}.{part}_proj.weight": torch.randn(shape)
        for n in (2, 0, 1)
        for part, shape in shapes.items()
    }
    fused = fuse_experts({**split, "norm": torch.ones(2)})
    assert fused.keys() == {"norm", f"{path}.gate_up_proj", f"{path}.down_proj"}
    for n in range(e):
        gate, up = fused[f"{path}.gate_up_proj"][n].chunk(2)
        assert torch.equal(gate, split[f"{path}.{n}.gate_proj.weight"])
        assert torch.equal(up, split[f"{path}.{n}.up_proj.weight"])
        assert torch.equal(fused[f"{path}.down_proj"][n], split[f"{path}.{n}.down_proj.weight"])
    incomplete = {name: t for name, t in split.items() if not name.endswith("1.up_proj.weight")}
    assert fuse_experts(incomplete).keys() == incomplete.keys()


def _write_autogptq_mixtral(directory: Path) -> dict[str, torch.Tensor]:
    """A Mixtral as AutoGPTQ saves it: w1, w2, w3, attention quantized too, biases of zero, settings and
    weights in files of its own naming. Returns the dense weights by their original names."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(directory)
    dense = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    stored = {}
    for index, name in enumerate(sorted(dense)):
        if not (".experts." in name or "_proj" in name):
            stored[name] = dense[name]
            continue
        prefix = name.removesuffix(".weight")
        layer = _random_layer(index, 4, 32, 32, 2)
        dense[name] = _dense(layer)
        parts = _encode(**layer, bits=4, checkpoint_format="gptq")
        stored |= {f"{prefix}.{part}": value for part, value in parts.items()}
        stored[f"{prefix}.bias"] = torch.zeros(32)
    save_file(stored, directory / "gptq_model-4bit-16g.safetensors")
    settings_ = {"bits": 4, "group_size": 16, "desc_act": True, "sym": False}
    (directory / "quantize_config.json").write_text(json.dumps(settings_))
    return dense


def test_autogptq_layout_is_read(tmp_path: Path) -> None:
    """Guards against taking such a checkpoint for an unquantized one, and against w1 and w3 swapped."""
    dense = _write_autogptq_mixtral(tmp_path)
    assert is_gptq(tmp_path)
    model = load_gptq_model(tmp_path, torch.float32)
    layer = model.model.layers[0]
    assert torch.equal(layer.self_attn.q_proj.weight, dense["model.layers.0.self_attn.q_proj.weight"])
    for expert in range(2):
        w1, w2, w3 = (
            dense[f"model.layers.0.block_sparse_moe.experts.{expert}.w{n}.weight"] for n in (1, 2, 3)
        )
        assert torch.equal(layer.mlp.experts.gate_up_proj[expert], torch.cat([w1, w3]))
        assert torch.equal(layer.mlp.experts.down_proj[expert], w2)


def test_evaluate_and_compare_read_gptq_checkpoints(moe_tiny_path: Path, tmp_path: Path) -> None:
    """Guards against random experts: rounded to 8 bits in GPTQ's format, attention too, the bundled model
    keeps its perplexity, from the function behind ``evaluate`` and from the row of ``compare``, which counts
    attention as it is stored."""
    _write_rounded(moe_tiny_path, tmp_path)
    text = str(moe_tiny_path.parent / "data" / "eval.jsonl")
    limits = {"sequence_length": 128, "max_tokens": 1024}
    full = evaluate_path(str(moe_tiny_path), text, **limits).perplexity
    rounded = evaluate_path(str(tmp_path), text, **limits).perplexity
    assert rounded == pytest.approx(full, rel=0.01)
    task = ComparisonTask(
        model=str(moe_tiny_path), bits=2.0, factor_bits=None, dataset="", eval=text,
        calibration_tokens=1024, batch_size=8, seed=0, group_size=64, prompt=None, new_tokens=1,
        checkpoint=str(tmp_path), **limits,
    )  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())  # what gptqmodel and auto-round write
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    row = run_method("checkpoint", task, tmp_path)  # in the dtype of the model that it is compared with
    assert row["perplexity"] == pytest.approx(rounded, rel=1e-6)
    assert row["kl_divergence"] < 3e-3  # bfloat16 hidden states; rounding to 2 bits gives 0.14
    # Codes, and per group a zero point of 8 and a scale of 16 bits; as many bytes as are in the file.
    assert row["bits_per_weight"] == pytest.approx(8 + 24 / 64, rel=1e-3)
    stored = load_file(tmp_path / "model.safetensors")
    assert any("self_attn" in name and name.endswith("qweight") for name in stored)
    assert row["total_bytes"] == sum(t.nbytes for name, t in stored.items() if not name.endswith("g_idx"))
    with pytest.raises(ConfigError, match="need each other"):
        compare(task, ("full",))


def _write_rounded(model: Path, directory: Path, group: int = 64) -> None:
    """Round experts and attention of a model to 8 bits and store them in GPTQModel's layout."""
    stored = {}
    weights = {k: v for file in model.glob("*.safetensors") for k, v in load_file(file).items()}
    for name, weight in weights.items():
        if ".experts." not in name and "_proj" not in name:
            stored[name] = weight
            continue
        prefix, (outputs, inputs) = name.removesuffix(".weight"), weight.shape
        grouped = weight.float().view(outputs, -1, group)
        scale = (grouped.abs().amax(-1) / 127).half()
        codes = (grouped / scale[..., None].float()).round().clamp(-127, 127).view(outputs, inputs) + 128
        stored[f"{prefix}.qweight"] = _pack_bytes(codes.T).contiguous()
        stored[f"{prefix}.qzeros"] = _pack_bytes(torch.full_like(scale, 128).T.float().T).T.contiguous()
        stored[f"{prefix}.scales"] = scale.T.contiguous()
        stored[f"{prefix}.g_idx"] = (torch.arange(inputs) // group).int()
    save_file(stored, directory / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"}
    (directory / "config.json").write_text(json.dumps(config))
    for file in model.glob("token*"):
        (directory / file.name).write_bytes(file.read_bytes())


def _pack_bytes(values: torch.Tensor) -> torch.Tensor:
    """Four 8-bit values of a column to one word, ``[n, m]`` -> ``[n / 4, m]`` int32."""
    parts = values.to(torch.int64).view(-1, 4, values.shape[1])
    words = sum(parts[:, i] << (8 * i) for i in range(4))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
