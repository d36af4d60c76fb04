"""Weights in low precision without their quantization_config are refused before work, at every door."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitsmoe_plugin import BitsMoEConfig, QuantizationError
from bitsmoe_plugin.cli import main
from bitsmoe_plugin.commands.estimate import estimate
from bitsmoe_plugin.integrations.optimum import BitsMoEQuantizer

TOKENS = torch.randint(1, 64, (8, 16), generator=torch.Generator().manual_seed(1))
OPTIONS = {"bits": 8, "method": "paper-v2", "basis_bits": 4, "basis_group_size": 16, "sequence_length": 16}
Tensors = dict[str, torch.Tensor]


def _config() -> BitsMoEConfig:
    return BitsMoEConfig(dataset=TOKENS.tolist(), **OPTIONS)


@pytest.fixture(scope="module")
def plain(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with shared experts and a dense layer, its experts one by one."""
    path = tmp_path_factory.mktemp("plain") / "model"
    tiny_model("deepseek_v2").save_pretrained(path)
    return path


def _changed(plain: Path, out: Path, change: Any) -> Path:
    shutil.copytree(plain, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def _fp8(part: str, scale: str = "weight_scale_inv", shape: tuple[int, ...] = (1, 1)) -> Any:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if part in name and name.endswith("proj.weight")]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name.removesuffix('weight')}{scale}"] = torch.ones(shape)

    return change


def _fused_fp8(tensors: Tensors) -> None:
    for layer in {name.split(".experts.")[0] for name in tensors if ".experts." in name}:
        own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{layer}.experts.")}
        gates = [
            torch.cat([own[f"{layer}.experts.{e}.{p}_proj.weight"] for p in ("gate", "up")]) for e in range(4)
        ]
        downs = [own[f"{layer}.experts.{e}.down_proj.weight"] for e in range(4)]
        tensors[f"{layer}.experts.gate_up_proj"] = torch.stack(gates).to(torch.float8_e4m3fn)
        tensors[f"{layer}.experts.down_proj"] = torch.stack(downs).to(torch.float8_e4m3fn)
        tensors[f"{layer}.experts.gate_up_proj_scale_inv"] = torch.ones(4, 1, 1)


def _int8(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = (tensors[name] * 100).to(torch.int8)


def _scales_alone(tensors: Tensors) -> None:
    """bfloat16 values that still have to be multiplied."""
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = tensors[name].bfloat16()
        tensors[f"{name}_scale"] = torch.ones(16 if "down" not in name else 32, 1)


def _packed(*ends: str) -> Any:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]
            for end in ends:
                tensors[name.removesuffix("weight") + end] = torch.zeros(4, 4, dtype=torch.int32)

    return change


def _prediction_layer(tensors: Tensors) -> None:
    tensors["model.layers.2.self_attn.o_proj.weight"] = torch.zeros(8, 8).to(torch.float8_e5m2)


CASES = {
    "experts, block scales": (_fp8(".experts."), r"experts\.0.*F8_E4M3.*weight_scale_inv.*block scales"),
    "fused": (_fused_fp8, r"experts\.down_proj \(F8_E4M3\).*gate_up_proj_scale_inv"),
    "attention": (_fp8("self_attn", "weight_scale", ()), r"self_attn\S* \(F8_E4M3\).*weight_scale"),
    "shared experts": (_fp8("shared_experts", "weight_scale", (16, 1)), r"shared_experts\S* \(F8_E4M3\)"),
    "head": (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}), "lm_head"),
    "int8": (_int8, r"experts\.0\.down_proj\.weight \(I8\)"),
    "scales alone": (_scales_alone, r"used by nothing.*weight_scale"),
    "gptq": (_packed("qweight", "qzeros", "scales", "g_idx"), "GPTQ"),
    "compressed-tensors": (_packed("weight_packed", "weight_scale"), "compressed-tensors"),
    "mxfp4": (_packed("weight_blocks", "weight_scales"), "MXFP4"),
    "prediction layer": (_prediction_layer, r"model\.layers\.2\S* \(F8_E5M2\)"),
    "unknown tensor": (
        lambda t: t.update({"model.layers.1.mlp.experts.0.gate_proj.mystery": torch.ones(2)}),
        r"mystery.*config\.json belongs to another model",
    ),
    "bias without a place": (
        lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(32)}),
        r"o_proj\.bias",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_in_low_precision_without_its_config_is_refused(
    case: str, plain: Path, tmp_path: Path
) -> None:
    """Guards against scales that nobody applies: noise would be quantized, with exit code 0."""
    change, message = CASES[case]
    model = _changed(plain, tmp_path / "model", change)
    with pytest.raises(QuantizationError, match=message) as error:
        AutoModelForCausalLM.from_pretrained(model, quantization_config=_config())
    assert "\n" not in str(error.value)
    with pytest.raises(QuantizationError, match=message):
        estimate(model, _config())


@pytest.fixture(scope="module")
def fp8(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _changed(plain, tmp_path_factory.mktemp("fp8") / "model", _fp8(".experts."))


def test_every_door_refuses_it(fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a command that measures or quantizes the same noise."""
    text = tmp_path / "text.txt"
    text.write_text("words " * 200, encoding="utf-8")
    commands = [
        ["estimate", fp8],
        ["quantize", fp8, tmp_path / "out", "--dataset", text],
        ["compare", fp8, "--dataset", text, "--eval", text, "--methods", "full"],
    ]
    for command in commands:
        assert main([str(part) for part in command]) == 2
        assert "stored in low precision" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(QuantizationError, match="low precision"):
        BitsMoEQuantizer.from_pretrained(fp8).quantize(tmp_path / "out", quantization_config=_config())
    from bitsmoe_plugin.commands.evaluate import load_for_evaluation

    with pytest.raises(QuantizationError, match="low precision"):
        load_for_evaluation(str(fp8))


def test_an_unknown_method_in_config_json_does_not_hide_it(fp8: Path, tmp_path: Path) -> None:
    """transformers skips a quant_method that it does not know, and would quantize what is stored."""
    for entry in (None, {"quant_method": "somebody_elses"}):
        model = tmp_path / str(entry is None)
        shutil.copytree(fp8, model)
        values = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**values, "quantization_config": entry}))
        with pytest.raises(QuantizationError, match="low precision"):
            AutoModelForCausalLM.from_pretrained(model, quantization_config=_config())


def test_pickled_files_are_looked_at_too(fp8: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(fp8, model)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(QuantizationError, match=r"experts\.0.*float8_e4m3fn"):
        AutoModelForCausalLM.from_pretrained(model, quantization_config=_config())


def test_an_index_names_tensors_before_their_files_are_there(fp8: Path, tmp_path: Path) -> None:
    """``bitsmoe estimate`` works on config and index alone."""
    names = load_file(fp8 / "model.safetensors")
    index = {"metadata": {"total_size": 10**6}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    shutil.copyfile(fp8 / "config.json", tmp_path / "config.json")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(QuantizationError, match="weight_scale_inv"):
        estimate(tmp_path, _config())


def _unrelated(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["mtp.norm.weight"] = torch.ones(32)
    tensors["model.vision_tower.patch.weight"] = torch.ones(4, 4)
    tensors["training_step"] = torch.ones(1)


@pytest.mark.filterwarnings("ignore:.*calibration token")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_plain_weights_are_taken_in_any_dtype(dtype: torch.dtype, plain: Path, tmp_path: Path) -> None:
    """Guards against refusing what transformers reads well: other floats, and tensors of other parts."""

    def change(tensors: Tensors) -> None:
        _unrelated(tensors)
        tensors.update({name: t.to(dtype) for name, t in tensors.items() if ".experts." in name})

    model = _changed(plain, tmp_path / "model", change)
    packed = AutoModelForCausalLM.from_pretrained(model, quantization_config=_config(), dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = TOKENS[:2]
    with torch.no_grad():
        error = (packed(ids).logits - reference(ids).logits).norm() / reference(ids).logits.norm()
    assert error < 0.02  # 8 bits
    packed.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(again(ids).logits, packed(ids).logits)
