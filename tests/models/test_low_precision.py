"""Checkpoints in low precision, quantized layer by layer, against the same dequantized by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from low_precision import BLOCK, Tensors, compressed, fp8, in_two_files, mxfp4, rewrite, scheme
from packaging.version import Version
from peak_memory import measured
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    FineGrainedFP8Config,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from bitsmoe_plugin import BitsMoEConfig, BitsMoEError, QuantizationError
from bitsmoe_plugin.cli import main
from bitsmoe_plugin.commands.bench.checkpoint import qwen3_moe, write_checkpoint
from bitsmoe_plugin.commands.estimate import estimate
from bitsmoe_plugin.models.model_class import load_model
from bitsmoe_plugin.pipeline import quantize_model
from bitsmoe_plugin.runtime.experts import BitsMoEExperts

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*calibration token", "ignore:attention and the rest"),
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.24"),
        reason="older ones do not dequantize by layers",
    ),
]
TOKENS = torch.randint(1, 64, (8, 32), generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, Any] = {"bits": 8, "sequence_length": 32, "basis_group_size": 16, "method": "fast"}
EXPERTS = ("re:.*mlp.experts.*",)
GPT_OSS = {"layer_types": ["full_attention"] * 2, "hidden_size": 64, "intermediate_size": 32}


def _config(**changes: Any) -> BitsMoEConfig:
    return BitsMoEConfig(dataset=TOKENS.tolist(), **{**OPTIONS, **changes})


def _quantized(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=_config())


def _packed(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{buffer}": tensor
        for name, module in model.named_modules()
        if isinstance(module, BitsMoEExperts)
        for buffer, tensor in module.packed().tensors()
    }


Make = Callable[[Path, Path], Path]
SOURCES: dict[str, tuple[str, dict[str, Any], Make]] = {
    "FP8 in blocks": ("qwen3_moe", {}, fp8),
    "FP8 in blocks, shared experts": ("deepseek_v3", {"kv_lora_rank": 16}, fp8),
    "FP8 in blocks, other names": ("mixtral", {}, lambda a, b: fp8(a, b, scale="scale")),
    "FP8 in blocks, per expert bias": ("minimax_m2", {}, fp8),
    "FP8 per tensor": ("glm4_moe", {}, lambda a, b: fp8(a, b, None)),
    "MXFP4": ("gpt_oss", GPT_OSS, mxfp4),
    "compressed-tensors, FP8 per tensor": (
        "qwen3_moe",
        {},
        lambda a, b: compressed(a, b, scheme("fp8 tensor")),
    ),
    "compressed-tensors, FP8 per channel": (
        "deepseek_v3",
        {},
        lambda a, b: compressed(a, b, scheme("fp8 channel")),
    ),
    "compressed-tensors, INT4 experts": (
        "deepseek_v3",
        {},
        lambda a, b: compressed(a, b, scheme("int4", EXPERTS)),
    ),
    "compressed-tensors, INT8": ("qwen3_moe", {}, lambda a, b: compressed(a, b, scheme("int8"))),
    "compressed-tensors, FP8 attention and INT4 experts": (
        "deepseek_v3",
        {},
        lambda a, b: compressed(a, b, scheme("int4", EXPERTS), scheme("fp8 channel", ("re:.*self_attn.*",))),
    ),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_packed_bytes_are_those_of_the_dequantized_model(kind: str, tiny_model: Any, tmp_path: Path) -> None:
    """Guards against scales that are lost, applied twice or cast, and against any rest of the source in what
    is saved: config.json and names are those of a model that was never in low precision."""
    family, changes, make = SOURCES[kind]
    model = tiny_model(family, **changes).bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(2))
    model.save_pretrained(tmp_path / "dense")
    low = make(tmp_path / "dense", tmp_path / "low")
    packed, reference = _quantized(low), load_model(low)
    assert reference.dtype == torch.bfloat16
    assert not torch.equal(reference.get_output_embeddings().weight, torch.zeros(()))
    experts = [name for name in model.state_dict() if name.endswith("down_proj") and "experts" in name]
    for name in experts:  # it is the model that was stored, but for what low precision loses
        lost = (reference.state_dict()[name] - model.state_dict()[name]).norm() / model.state_dict()[
            name
        ].norm()
        assert 0 < lost < 0.2
    quantize_model(reference, TOKENS, _config())
    wanted, found = _packed(reference), _packed(packed)
    assert len(wanted) > 0
    assert wanted.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    assert all(torch.equal(t, packed.state_dict()[name]) for name, t in reference.state_dict().items())
    _check_saved(packed, tmp_path)


def _check_saved(packed: Any, path: Path) -> None:
    packed.save_pretrained(path / "packed")
    plain = _quantized(path / "dense")
    plain.save_pretrained(path / "plain")
    names = [load_file(path / out / "model.safetensors") for out in ("packed", "plain")]
    assert names[0].keys() == names[1].keys()
    assert all(names[0][name].dtype == names[1][name].dtype for name in names[0])
    configs = [json.loads((path / out / "config.json").read_text()) for out in ("packed", "plain")]
    settings = [config.pop("quantization_config") for config in configs]
    assert configs[0] == configs[1]
    assert settings[0].keys() == settings[1].keys()
    assert settings[0]["quant_method"] == "bitsmoe"
    loaded = AutoModelForCausalLM.from_pretrained(path / "packed")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, packed(TOKENS).logits)


def test_blocks_that_are_not_whole_outside_the_experts(tiny_model: Any, tmp_path: Path) -> None:
    """Guards DeepSeek-V3's kv_a_proj_with_mqa: 576 rows in blocks of 128, whose size cannot be told from the
    number of scales. Here it has 24, in blocks of 16 (and the product of scale and value is done by hand)."""
    model = tiny_model("deepseek_v3").bfloat16()
    model.save_pretrained(tmp_path / "dense")
    low = fp8(tmp_path / "dense", tmp_path / "low")
    packed, stored = _quantized(low), load_file(low / "model.safetensors")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert stored[name].shape == (24, 32)
    scales = stored[f"{name}_scale_inv"].repeat_interleave(16, 0).repeat_interleave(16, 1)[:24, :32]
    assert torch.equal(packed.state_dict()[name], (stored[name].float() * scales).bfloat16())
    with pytest.raises(QuantizationError, match=r"kv_a_proj_with_mqa.*transformers loads it wrongly"):
        load_model(low)


PREDICTION: dict[str, Make] = {
    "fp8": fp8,
    "compressed-tensors": lambda a, b: compressed(
        a, b, scheme("int4", EXPERTS), scheme("fp8 channel", ("re:.*self_attn.*",))
    ),
}


@pytest.mark.parametrize("kind", PREDICTION)
def test_prediction_layers_are_decoded(kind: str, tiny_model: Any, tmp_path: Path) -> None:
    """Guards layers that the model has no place for, as DeepSeek-V3's: saved in bfloat16, equal to the layer
    that they were copied from as transformers dequantizes it, and counted in what the rest grows to."""
    model = tiny_model("deepseek_v3", kv_lora_rank=16).bfloat16()
    model.save_pretrained(tmp_path / "dense")

    def add(tensors: Tensors) -> None:
        for name in [name for name in tensors if "layers.1." in name]:
            tensors[name.replace("layers.1.", "layers.2.")] = tensors[name].clone()

    rewrite(tmp_path / "dense", add)
    low = PREDICTION[kind](tmp_path / "dense", tmp_path / "low")
    with pytest.warns(UserWarning, match=r"attention and the rest: (\S+) kB stored") as told:
        packed = _quantized(low)
    packed.save_pretrained(tmp_path / "packed")
    saved, stored = (load_file(tmp_path / out / "model.safetensors") for out in ("packed", "dense"))
    load_model(low).save_pretrained(tmp_path / "dequantized")
    wanted = load_file(tmp_path / "dequantized" / "model.safetensors")
    names = [name for name in stored if "layers.2." in name]
    assert any(".experts." in name for name in names)
    assert [name for name in saved if "layers.2." in name] == names
    for name in names:
        assert torch.equal(saved[name], wanted[name.replace("layers.2.", "layers.1.")])
        assert saved[name].dtype == stored[name].dtype
    others = sum(t.nbytes for name, t in saved.items() if "bitsmoe_" not in name)
    assert any(f"{others / 1000:.3f} kB stored" in str(warning.message) for warning in told)


OF_ACTIVATIONS: dict[str, tuple[Make, str]] = {
    "fp8, cache": (fp8, "self_attn.k_scale"),
    "fp8, inputs": (lambda a, b: fp8(a, b, None), "self_attn.q_proj.input_scale"),
    "compressed-tensors, cache": (lambda a, b: compressed(a, b, scheme("fp8 tensor")), "self_attn.v_scale"),
    "compressed-tensors, output": (
        lambda a, b: compressed(a, b, scheme("int4")),
        "self_attn.k_proj.output_scale",
    ),
    "compressed-tensors, inputs": (
        lambda a, b: compressed(a, b, scheme("fp8 tensor")),
        "mlp.experts.2.up_proj.input_scale",
    ),
}


@pytest.mark.parametrize("kind", OF_ACTIVATIONS)
def test_scales_of_activations_are_left_out(kind: str, dense: Path, tmp_path: Path) -> None:
    """Guards checkpoints whose publisher also quantizes inputs, or cached keys and values: what has no
    module around it is refused as before."""
    make, name = OF_ACTIVATIONS[kind]
    low, more = (make(dense, tmp_path / out) for out in ("low", "more"))
    rewrite(more, lambda t: t.update({f"model.layers.1.{name}": torch.tensor(0.5)}))
    wanted, found = _quantized(low), _quantized(more)
    assert wanted.state_dict().keys() == found.state_dict().keys()
    assert all(torch.equal(t, found.state_dict()[key]) for key, t in wanted.state_dict().items())
    assert load_model(more).state_dict().keys() == load_model(low).state_dict().keys()
    found.save_pretrained(tmp_path / "packed")
    assert f"model.layers.1.{name}" not in load_file(tmp_path / "packed" / "model.safetensors")
    lost = "model.layers.1.lost.k_scale"
    rewrite(more, lambda t: t.update({lost: torch.tensor(0.5)}))
    _refused(more, rf"used by nothing in the model: {lost}")


def test_scales_in_another_file(tiny_model: Any, tmp_path: Path) -> None:
    """Guards large checkpoints, where weights and their scales need not stand in the same file."""
    tiny_model("qwen3_moe").bfloat16().save_pretrained(tmp_path / "dense")
    low, split = (fp8(tmp_path / "dense", tmp_path / name) for name in ("low", "split"))
    in_two_files(split)
    wanted, found = _packed(_quantized(low)), _packed(_quantized(split))
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    assert estimate(split, _config()).source_bits_per_weight == pytest.approx(8 + 32 / 256)


def _left(original: Path, *parts: str) -> Damage:
    """Put weights back that the publisher has left as they were."""

    def change(tensors: Tensors) -> None:
        for name, weight in load_file(original / "model.safetensors").items():
            if any(part in name for part in parts):
                for stored in [other for other in tensors if other.startswith(name)]:
                    del tensors[stored]
                tensors[name] = weight

    return change


LEFT: dict[str, tuple[Make, tuple[str, ...]]] = {
    "fp8": (fp8, ("layers.1.mlp.experts.", "layers.0.self_attn.q_proj")),
    "compressed-tensors, FP8": (
        lambda a, b: compressed(a, b, scheme("fp8 channel")),
        ("layers.1.mlp.experts.", "layers.0.self_attn.q_proj"),
    ),
    "compressed-tensors, INT4": (lambda a, b: compressed(a, b, scheme("int4")), ("self_attn.q_proj",)),
}


@pytest.mark.parametrize("kind", LEFT)
def test_layers_that_were_left_unquantized(kind: str, dense: Path, tmp_path: Path) -> None:
    """Guards publishers' lists of what they do not quantize."""
    make, parts = LEFT[kind]
    low, plain = make(dense, tmp_path / "low"), tmp_path / "plain"
    load_model(low).save_pretrained(plain)
    for path in (low, plain):
        rewrite(path, _left(dense, *parts))
    wanted, found = _quantized(plain), _quantized(low)
    assert all(torch.equal(t, found.state_dict()[name]) for name, t in wanted.state_dict().items())
    assert all(torch.equal(t, _packed(found)[name]) for name, t in _packed(wanted).items())


PARTLY: dict[str, tuple[Make, str]] = {
    "fp8": (fp8, "layers.1.mlp.experts.2."),
    "fp8, one projection": (fp8, "layers.1.mlp.experts.2.up_proj"),
    "compressed-tensors": (lambda a, b: compressed(a, b, scheme("int4")), "layers.1.mlp.experts."),
}


@pytest.mark.parametrize("kind", PARTLY)
def test_experts_partly_in_low_precision_are_refused(kind: str, dense: Path, tmp_path: Path) -> None:
    """Guards against an error of transformers when all else was loaded, and experts left at random."""
    make, part = PARTLY[kind]
    low = make(dense, tmp_path / "low")
    rewrite(low, _left(dense, part))
    message = (
        rf"stored in {kind.partition(',')[0]}, and .*{part}.*BF16.*reads in the same way.*give a checkpoint"
    )
    _refused(low, message)
    with pytest.raises(QuantizationError, match=message):
        load_model(low)


def test_experts_in_fp4(tiny_model: Any, tmp_path: Path) -> None:
    """Guards the experts of DeepSeek-V4: two values per byte in a checkpoint of ``fp8``. What safetensors
    calls F4 is refused, because it reads no part of it."""
    tiny_model("qwen3_moe", hidden_size=64, moe_intermediate_size=32).bfloat16().save_pretrained(
        tmp_path / "dense"
    )
    low = fp8(tmp_path / "dense", tmp_path / "low")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    plain: Tensors = {}

    def change(tensors: Tensors) -> None:
        made = torch.Generator().manual_seed(3)
        for name in [n for n in tensors if ".experts." in n and n.endswith(".weight")]:
            rows, columns = tensors[name].shape
            codes = torch.randint(0, 16, (rows, columns), generator=made)
            exponents = torch.randint(120, 124, (rows, columns // 32), generator=made, dtype=torch.uint8)
            plain[name] = (values[codes] * (exponents.repeat_interleave(32, 1) - 127.0).exp2()).bfloat16()
            packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
            tensors[name] = packed.view(torch.int8)
            tensors[f"{name}_scale_inv"] = exponents.view(torch.float8_e8m0fnu)

    rewrite(low, change)
    load_model(low).save_pretrained(tmp_path / "plain")
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.equal(weight, stored[name]) for name, weight in plain.items())
    wanted, found = _packed(_quantized(tmp_path / "plain")), _packed(_quantized(low))
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    assert estimate(low, _config()).source_bits_per_weight == pytest.approx(4 + 8 / 32)
    rewrite(low, lambda t: t.update({EXPERT: t[EXPERT].view(torch.float4_e2m1fn_x2)}))
    _refused(low, rf"{EXPERT} \(F4.*does not read this dtype in parts; give")


@pytest.mark.exhaustive
def test_peak_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Guards the bound of streaming, from outside: 6 further layers are 28 MB of experts in bfloat16, 14 MB
    in FP8. See the test of the same name for unquantized models."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 512, "num_experts": 24, "num_experts_per_tok": 4}
    small = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256}
    peaks = []
    for layers in (2, 8):
        write_checkpoint(tmp_path / f"dense{layers}", qwen3_moe(layers, **sizes, **small))
        low = fp8(tmp_path / f"dense{layers}", tmp_path / f"low{layers}")
        peaks.append(measured(low, tmp_path / f"out{layers}"))
    growth = {kind: peaks[1][kind] - peaks[0][kind] for kind in ("anonymous", "resident")}
    print(f"peak at 2 layers {peaks[0]}, at 8 layers {peaks[1]}")
    assert growth["anonymous"] < 12e6
    assert growth["resident"] < 20e6


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe"])
def test_experts_in_one_piece(family: str, tiny_model: Any, tmp_path: Path) -> None:
    """Guards experts that are stored in one piece, as Qwen3-VL-MoE's (transposed) are published in FP8:
    transformers has no rule for their scales, and would leave them out."""
    model = _fused_model(family, tiny_model)
    model.save_pretrained(tmp_path / "dense")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if family == "qwen3_moe":
        rewrite(tmp_path / "dense", lambda t: tensors)
    low = fp8(tmp_path / "dense", tmp_path / "low")
    stored = load_file(low / "model.safetensors")
    assert any(name.endswith("experts.down_proj_scale_inv") for name in stored)

    def dequantize(found: Tensors) -> Tensors:
        for name in [name for name in found if f"{name}_scale_inv" in found]:
            scales = found.pop(f"{name}_scale_inv").repeat_interleave(16, -2).repeat_interleave(16, -1)
            found[name] = (found[name].float() * scales).bfloat16()
        return found

    shutil.copytree(tmp_path / "dense", tmp_path / "plain")
    rewrite(tmp_path / "plain", lambda t: dequantize(dict(stored)))
    auto = AutoModelForMultimodalLM if family == "qwen3_vl_moe" else AutoModelForCausalLM
    found, wanted = (
        auto.from_pretrained(path, quantization_config=_config()) for path in (low, tmp_path / "plain")
    )
    assert found.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(t, wanted.state_dict()[name]) for name, t in found.state_dict().items())
    with pytest.raises(QuantizationError, match=r"in one piece.*transformers loads it wrongly"):
        load_model(low)


def _fused_model(family: str, tiny_model: Any) -> Any:
    if family == "qwen3_moe":
        return tiny_model(family).bfloat16()
    text = dict.fromkeys(("moe_intermediate_size", "head_dim"), 16)
    text |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2)
    text |= {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}
    text |= {"num_experts": 4, "num_experts_per_tok": 2}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [0]}
    torch.manual_seed(0)
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    return Qwen3VLMoeForConditionalGeneration(config).bfloat16()


@pytest.fixture(scope="module")
def dense(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "model"
    tiny_model("qwen3_moe").bfloat16().save_pretrained(path)
    return path


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
ATTENTION = "model.layers.0.self_attn.q_proj.weight"
Damage = Callable[[Tensors], Any]


def _set(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def _nan(scales: Tensor) -> Tensor:
    scales.view(-1)[-1] = float("nan")
    return scales


FP8_DAMAGE: dict[str, tuple[Damage, str]] = {
    "no scales": (
        lambda t: t.pop(f"{EXPERT}_scale_inv"),
        rf"{EXPERT} .*F8_E4M3.*fp8, and its scales are missing",
    ),
    "no scales of attention": (
        lambda t: t.pop(f"{ATTENTION}_scale_inv"),
        rf"{ATTENTION} .*scales are missing",
    ),
    "no weight": (lambda t: t.pop(EXPERT), rf"{EXPERT}_scale_inv .*scales of fp8.*weight is missing"),
    "too many scales": (
        _set(f"{EXPERT}_scale_inv", lambda s: torch.ones(2, 2)),
        rf"{EXPERT}_scale_inv .*\[2, 2\].* does not fit .*'fp8' has \[1, 2\], of blocks of 16x16",
    ),
    "one scale": (_set(f"{ATTENTION}_scale_inv", lambda s: torch.ones(())), "q_proj.*does not fit.*'fp8'"),
    "NaN": (_set(f"{EXPERT}_scale_inv", _nan), rf"{EXPERT}_scale_inv.*fp8.*no finite numbers"),
    "infinite": (_set(f"{ATTENTION}_scale_inv", lambda s: s / 0), f"{ATTENTION}_scale_inv.*no finite"),
    "not in low precision": (_set(EXPERT, lambda w: w.bfloat16()), rf"{EXPERT} \(BF16.*but has scales"),
    "INT8": (_set(ATTENTION, lambda w: w.view(torch.int8)), "q_proj.*does not fit"),
    "of another scheme": (
        lambda t: t.update({EXPERT.replace("weight", "qweight"): torch.zeros(4, 4, dtype=torch.int32)}),
        "qweight.*quant_method 'fp8'",
    ),
    "in one piece": (
        lambda t: t.update(
            {"model.layers.1.mlp.experts.down_proj": torch.zeros(4, 32, 16).to(torch.float8_e4m3fn)}
        ),
        r"experts\.down_proj \(F8_E4M3.*fp8, and its scales are missing",
    ),
}


def _refused(path: Path, message: str, by_estimate: bool = True) -> None:
    with pytest.raises(QuantizationError, match=message) as error:
        _quantized(path)
    assert "\n" not in str(error.value)
    if by_estimate:
        with pytest.raises(QuantizationError, match=message):
            estimate(path, _config())


@pytest.mark.parametrize("damage", FP8_DAMAGE)
def test_damaged_fp8_is_refused(damage: str, dense: Path, tmp_path: Path) -> None:
    """Guards against what transformers does with it: values without their scales, or an error when half of
    the model is loaded."""
    change, message = FP8_DAMAGE[damage]
    low = fp8(dense, tmp_path / "low")
    rewrite(low, change)
    _refused(low, message, by_estimate="finite" not in message)


def _of_config(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda settings: settings.update(changes)


SETTINGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "other blocks": (_of_config(weight_block_size=[32, 32]), r"scale_inv .*does not fit.*blocks of 32x32"),
    "blocks in one dimension": (_of_config(weight_block_size=[16]), "fp8.*weight_block_size"),
    "no blocks": (_of_config(weight_block_size=None), "does not fit.*one, or one per row"),
    "blocks of nothing": (_of_config(weight_block_size=[0, 16]), "fp8.*weight_block_size"),
    "no list": (_of_config(weight_block_size="16x16"), "fp8"),
    "activations": (_of_config(activation_scheme=None), "fp8.*quantization_config in config.json"),
    "unknown": (_of_config(quant_method="fp7"), r"F8_E4M3.*'fp7'"),
    "gptq": (_of_config(quant_method="gptq", bits=4), r"'gptq'.*has no operation that dequantizes it"),
    "awq": (_of_config(quant_method="awq", bits=4), r"'awq'.*has no operation that dequantizes it"),
    "bitsandbytes": (_of_config(quant_method="bitsandbytes", load_in_4bit=True), "bitsandbytes"),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_that_do_not_fit_are_refused(kind: str, dense: Path, tmp_path: Path) -> None:
    """Guards against another block size than the scales', and against methods that nobody decodes: never is
    a model returned that was not quantized by us."""
    change, message = SETTINGS[kind]
    low = fp8(dense, tmp_path / "low")
    settings = json.loads((low / "config.json").read_text())["quantization_config"]
    change(settings)
    rewrite(low, lambda t: t, settings)
    _refused(low, message)


def test_settings_without_a_method_are_refused(dense: Path, tmp_path: Path) -> None:
    """Guards the commands against the error of transformers, which python users get."""
    low = fp8(dense, tmp_path / "low")
    rewrite(low, lambda t: t, {"weight_block_size": [16, 16]})
    with pytest.raises(ValueError, match="no `quant_method`"):
        _quantized(low)
    for door in (lambda: estimate(low, _config()), lambda: load_model(low)):
        with pytest.raises(QuantizationError, match="has no quant_method"):
            door()


def test_blocks_do_not_divide_an_expert(tiny_model: Any, tmp_path: Path) -> None:
    """Guards the size of a block that transformers derives: 24 rows in two blocks of 16 would be two of 12"""
    tiny_model("qwen3_moe", moe_intermediate_size=24).bfloat16().save_pretrained(tmp_path / "dense")
    low = fp8(tmp_path / "dense", tmp_path / "low")
    _refused(low, r"experts\S*weight .*fp8 in blocks of 16x16, which do not divide 24")


CT_DAMAGE: dict[str, tuple[Damage, str]] = {
    "no scales": (
        lambda t: t.pop(f"{EXPERT}_scale"),
        rf"{EXPERT}_packed .*compressed-tensors pack-quantized.*int 4.*weight_scale is missing",
    ),
    "no shape": (lambda t: t.pop(f"{EXPERT}_shape"), "weight_shape is missing"),
    "no weight": (lambda t: t.pop(f"{EXPERT}_packed"), f"{EXPERT}_s.*compressed-tensors.*is missing"),
    "other scales": (_set(f"{EXPERT}_scale", lambda s: s[:, :1]), f"{EXPERT}_scale .*does not fit"),
    "NaN": (_set(f"{EXPERT}_scale", _nan), f"{EXPERT}_scale.*compressed-tensors.*no finite"),
    "zero points": (
        lambda t: t.update({f"{EXPERT}_zero_point": torch.zeros(16, 2, dtype=torch.int32)}),
        "weight_zero_point .*does not belong",
    ),
    "order": (
        lambda t: t.update({f"{EXPERT}_g_idx": torch.zeros(32, dtype=torch.int32)}),
        "weight_g_idx .*does not belong",
    ),
}


@pytest.mark.parametrize("damage", CT_DAMAGE)
def test_damaged_compressed_tensors_are_refused(damage: str, dense: Path, tmp_path: Path) -> None:
    """Guards against scales and zero points that transformers' operation leaves out."""
    change, message = CT_DAMAGE[damage]
    low = compressed(dense, tmp_path / "low", scheme("int4"))
    rewrite(low, change)
    _refused(low, message, by_estimate="finite" not in message)


GROUPS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "asymmetric": (
        [scheme("int4", symmetric=False)],
        r"weight_packed .*int 4, group, asymmetric.*does not dequantize",
    ),
    "INT8 of activations": (
        [{**scheme("int8"), "format": "int-quantized"}],
        "weight .*int-quantized.*does not dequantize",
    ),
    "several": (
        [scheme("int4", ("re:.*q_proj.*",)), scheme("int8", ("re:.*o_proj.*",))],
        "several schemes.*group_0, group_1",
    ),
    "actorder": ([scheme("int4", actorder="group")], r"int 4, group, actorder group.*does not dequantize"),
    "3 bits": ([scheme("int3")], "int 3.*does not dequantize"),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_schemes_of_compressed_tensors_that_transformers_reads_wrongly(
    kind: str, dense: Path, tmp_path: Path
) -> None:
    """Guards against one scheme for tensors of another, and against zero points that are not applied."""
    groups, message = GROUPS[kind]
    _refused(compressed(dense, tmp_path / "low", *groups), message)


def test_damaged_mxfp4_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    """Guards scales without blocks and the reverse, and exponents that stand for NaN."""
    tiny_model("gpt_oss", **GPT_OSS).bfloat16().save_pretrained(tmp_path / "dense")
    name = "model.layers.1.mlp.experts.down_proj"
    cases: dict[str, Damage] = {
        rf"{name}_blocks .*mxfp4, and its _scales are missing": lambda t: t.pop(f"{name}_scales"),
        rf"{name}_scales .*mxfp4, and their _blocks are missing": lambda t: t.pop(f"{name}_blocks"),
        rf"{name}_blocks .*does not go with": _set(f"{name}_scales", lambda s: s[:, :-1]),
        rf"{name}_scales, scales of mxfp4, .*no finite": _set(f"{name}_scales", lambda s: s * 0 + 255),
    }
    for i, (message, change) in enumerate(cases.items()):
        low = mxfp4(tmp_path / "dense", tmp_path / f"low{i}")
        rewrite(low, change)
        _refused(low, message, by_estimate="finite" not in message)


def test_other_configs_are_merged_as_before(dense: Path, tmp_path: Path) -> None:
    """Guards users of transformers who do not quantize: what it merges and refuses is as it was."""
    low = fp8(dense, tmp_path / "low")
    settings = FineGrainedFP8Config(weight_block_size=BLOCK, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(low, quantization_config=settings)
    assert not hasattr(model.config, "quantization_config")
    _quantized(dense).save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="BitsMoEConfig but you are passing a FineGrainedFP8Config"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed", quantization_config=settings)
    options = {"quant_method": "bitsmoe", **OPTIONS, "dataset": TOKENS.tolist()}
    as_dict = AutoModelForCausalLM.from_pretrained(low, quantization_config=options)
    assert all(torch.equal(t, _packed(as_dict)[name]) for name, t in _packed(_quantized(low)).items())


def test_model_that_stays_in_low_precision_is_refused(dense: Path, tmp_path: Path) -> None:
    """Guards ``quantize_model``: what it would return could be saved neither as packed nor as it was."""
    low = compressed(dense, tmp_path / "low", scheme("int4"))
    model = AutoModelForCausalLM.from_pretrained(low)
    with pytest.raises(
        QuantizationError, match=r"loaded in compressed-tensors; .*BitsMoEConfig.*dequantize=True"
    ):
        quantize_model(model, TOKENS, _config())
    packed = _quantized(dense)
    with pytest.raises(QuantizationError, match="experts is quantized already"):
        quantize_model(packed, TOKENS, _config())


def test_estimate_counts_what_is_stored(dense: Path, tmp_path: Path) -> None:
    """Guards the sizes of the source, in bits per expert weight with scales, and of what grows."""
    low = fp8(dense, tmp_path / "low")
    found, plain = estimate(low, _config()), estimate(dense, _config())
    stored = load_file(low / "model.safetensors")
    others = sum(t.nbytes for name, t in stored.items() if ".experts." not in name)
    assert found.source == "fp8"
    assert found.source_bits_per_weight == pytest.approx(8 + 32 / 256)
    assert found.source_other_bytes == others < found.other_bytes
    assert (found.other_bytes, found.expert_bytes) == (plain.other_bytes, plain.expert_bytes)
    assert (plain.source, plain.source_other_bytes) == (None, None)
    with pytest.warns(
        UserWarning, match=r"attention and the rest: \S+ kB stored, \S+ kB in the source \(fp8\)"
    ):
        _quantized(low)


def test_command_line(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the command: it quantizes a checkpoint in FP8, and says in one line what it cannot read."""
    low, text = fp8(dense, tmp_path / "low"), tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in TOKENS.tolist()))
    options = ["--bits", "8", "--dataset", str(text), "--sequence-length", "32", "--method", "fast"]
    options += ["--option", "basis_group_size=16"]
    with pytest.warns(UserWarning, match=r"kB in the source \(fp8\)"):
        assert main(["quantize", str(low), str(tmp_path / "out"), *options]) == 0
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "bitsmoe"
    shutil.copytree(low, tmp_path / "damaged")
    rewrite(tmp_path / "damaged", lambda t: t.pop(f"{EXPERT}_scale_inv"))
    assert main(["quantize", str(tmp_path / "damaged"), str(tmp_path / "none"), *options]) != 0
    assert "its scales are missing" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "none").exists()
    with pytest.raises(BitsMoEError, match="quantized already"):
        estimate(tmp_path / "out", _config())
