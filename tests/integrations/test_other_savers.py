"""Packed checkpoints load where the dense model's do, by whatever of transformers' ways they were saved."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from bitsmoe_plugin import BitsMoEConfig, CheckpointError
from bitsmoe_plugin.commands.inspect import inspect_checkpoint

TOKENS = torch.randint(1, 64, (8, 16), generator=torch.Generator().manual_seed(1))
OPTIONS = {"bits": 8, "method": "paper-v2", "basis_bits": 4, "basis_group_size": 16, "sequence_length": 16}
FAMILIES = {"tied": ("qwen3_moe", {"tie_word_embeddings": True}), "renamed": ("mixtral", {})}


@pytest.fixture(scope="module", params=FAMILIES)
def packed(request: pytest.FixtureRequest, tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, changes = FAMILIES[request.param]
    path = tmp_path_factory.mktemp("packed")
    tiny_model(family, **changes).save_pretrained(path / "dense")
    config = BitsMoEConfig(dataset=TOKENS.tolist(), **OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(path / "dense", quantization_config=config)
    model.save_pretrained(path / "packed")
    return path / "packed"


def _accelerate(model: Any, out: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator().save_model(model, str(out), max_shard_size="30KB")
    model.config.save_pretrained(out)


def _accelerate_state(model: Any, out: Path) -> None:
    accelerator = pytest.importorskip("accelerate").Accelerator()
    accelerator.prepare(model)
    accelerator.save_state(str(out))
    model.config.save_pretrained(out)


def _safetensors(model: Any, out: Path) -> None:
    out.mkdir()
    save_model(model, str(out / "model.safetensors"), metadata={"format": "pt"})  # keeps the other tied name
    model.config.save_pretrained(out)


def _clones(model: Any, out: Path) -> None:
    out.mkdir()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # both tied names
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(out)


SAVERS: dict[str, Callable[[Any, Path], None]] = {
    "own names": lambda model, out: model.save_pretrained(out, save_original_format=False),
    "shards": lambda model, out: model.save_pretrained(out, max_shard_size="30KB"),
    "state dict": lambda model, out: model.save_pretrained(out, state_dict=model.state_dict()),
    "accelerate": _accelerate,
    "accelerate state": _accelerate_state,
    "safetensors": _safetensors,
    "clones": _clones,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saver", SAVERS)
def test_it_loads_and_is_still_checked(saver: str, packed: Path, tmp_path: Path) -> None:
    """Guards against "altered" for a checkpoint whose names alone are others, and for one that was."""
    model = AutoModelForCausalLM.from_pretrained(packed)
    out = tmp_path / "out"
    SAVERS[saver](model, out)
    again = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    inspect_checkpoint(out)
    file = sorted(out.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = next(name for name in tensors if ".bitsmoe_" not in name)
    tensors[name] = tensors[name] + 1
    save_file(tensors, file, {"format": "pt"})
    for look in (AutoModelForCausalLM.from_pretrained, inspect_checkpoint):
        with pytest.raises(CheckpointError, match=r"differs from what was written.*save_pretrained"):
            look(out)


@pytest.mark.parametrize("shard", ["30KB", "1GB"])
def test_a_variant(shard: str, packed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path, variant="small", max_shard_size=shard)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, variant="small")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.filterwarnings("ignore")
def test_the_base_model_alone(packed: Path, tmp_path: Path) -> None:
    """A head that is not there is made anew, as with a dense model; one that is altered is not."""
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.model.save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    want = model.model(TOKENS).last_hidden_state
    assert torch.equal(base(TOKENS).last_hidden_state, want)
    inspect_checkpoint(tmp_path / "base")
    whole, report = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    tied = model.config.tie_word_embeddings
    assert report["missing_keys"] == (set() if tied else {"lm_head.weight"})
    assert torch.equal(whole.model(TOKENS).last_hidden_state, want)
    whole.save_pretrained(tmp_path / "whole")  # what there is now is recorded
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(again(TOKENS).logits, whole(TOKENS).logits)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["norm.weight"] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"norm\.weight differs"):
        AutoModel.from_pretrained(tmp_path / "base")


def test_another_head(packed: Path, tmp_path: Path) -> None:
    model, report = AutoModelForSequenceClassification.from_pretrained(packed, output_loading_info=True)
    assert report["missing_keys"] == {"score.weight"}
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_a_state_dict_goes_into_a_loaded_model(packed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = AutoModelForCausalLM.from_pretrained(packed)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_pickled_weights_are_refused_with_what_to_do(packed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is no safetensors file.*save_pretrained"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_weights_that_were_changed_are_recorded_anew(packed: Path, tmp_path: Path) -> None:
    """As of an adapter that was merged: the record is of what is saved, not of what was loaded."""
    model = AutoModelForCausalLM.from_pretrained(packed)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("change", ["swap", "drop", "add"])
def test_what_no_saver_does_is_refused(change: str, packed: Path, tmp_path: Path) -> None:
    """Guards against a check that is satisfied by any tensors that were once recorded."""
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    tensors = load_file(out / "model.safetensors")
    first, second = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    if change == "swap":
        tensors[first], tensors[second] = tensors[second], tensors[first]
    elif change == "drop":
        del tensors[first]
    else:
        tensors["model.layers.0.self_attn.extra"] = tensors[first].clone()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    message = {"swap": "differs", "drop": "missing", "add": "was not when it was written"}[change]
    for look in (AutoModelForCausalLM.from_pretrained, inspect_checkpoint):
        with pytest.raises(CheckpointError, match=message):
            look(out)
