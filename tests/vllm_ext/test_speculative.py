"""Speculative decoding in vLLM: prediction layers of packed models, packed models as and with drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_support import DEEPSEEK_V3, needs_vllm, pack_small, run_vllm, small_model

from bitsmoe_plugin import CheckpointError, ConfigError

pytestmark = [needs_vllm, pytest.mark.filterwarnings("ignore:.*calibration token")]

DENSE = Path(__file__).parents[2] / "examples" / "moe-tiny"
PROMPTS = [[5, 6, 7, 11, 13, 60, 61, 62, 3, 9], [17, 30, 2], [44, 45] * 20]


def prediction_layer(model: Any) -> dict[str, Tensor]:
    """Tensors of a layer for multi-token prediction behind a GLM4-MoE or DeepSeek-V3 of two layers, experts
    dense.

    It hands on the state that it is given, so that it drafts the token before again: right in loops, which
    greedy texts of random models end in.
    """
    last, size = "model.layers.1.", model.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    layer = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(last) and ".experts." not in name:
            small = 0.01 * torch.randn(tensor.shape, generator=generator)
            layer[name.replace(last, "model.layers.2.")] = (
                small if tensor.dim() > 1 else torch.ones_like(tensor)
            )
    for expert in range(model.config.n_routed_experts):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.2.mlp.experts.{expert}.{part}.weight"
            layer[name] = 0.01 * torch.randn(64, size, generator=generator)
    norms = {f"model.layers.2.{n}.weight": torch.ones(size) for n in ("enorm", "hnorm", "shared_head.norm")}
    layer["model.layers.2.eh_proj.weight"] = torch.cat([torch.zeros(size, size), torch.eye(size)], 1)
    layer["model.layers.2.shared_head.head.weight"] = model.lm_head.weight.data.clone()
    if model.config.model_type == "deepseek_v3":  # published files have a copy
        layer["model.layers.2.embed_tokens.weight"] = model.model.embed_tokens.weight.data.clone()
    return {**layer, **norms}


@pytest.fixture(scope="module")
def results(packed_moe_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each target without and with drafts."""
    folder = tmp_path_factory.mktemp("speculative")
    glm = small_model("glm4_moe", head_dim=32, num_nextn_predict_layers=1)
    deepseek = small_model("deepseek_v3", num_nextn_predict_layers=1, **DEEPSEEK_V3)
    models = {
        "glm": pack_small(glm, folder / "glm", prediction_layer(glm)),
        "deepseek": pack_small(deepseek, folder / "deepseek", prediction_layer(deepseek)),
        "packed": packed_moe_tiny,
        "dense": DENSE,
    }
    drafts: dict[str, dict[str, Any]] = {
        "glm": {"method": "mtp", "num_speculative_tokens": 1},
        "deepseek": {"method": "mtp", "num_speculative_tokens": 1},
        "packed": {"model": str(DENSE), "num_speculative_tokens": 3},
        "dense": {"model": str(packed_moe_tiny), "num_speculative_tokens": 3},
    }
    jobs = {}
    for name, path in models.items():
        jobs[name] = {"model": str(path), "prompts": PROMPTS, "max_tokens": 24}
        jobs[f"{name} with drafts"] = {**jobs[name], "options": {"speculative_config": drafts[name]}}
    return dict(zip(jobs, run_vllm(list(jobs.values()), folder), strict=True))


@pytest.mark.parametrize("target", ["glm", "deepseek", "packed", "dense"])
def test_drafts_change_no_token(target: str, results) -> None:
    """glm, deepseek: the prediction layer's experts are dense, and no layer of the manifest. packed: the
    draft must not be taken for packed. dense: the draft's layers have names of their own, and come from its
    own files."""
    plain, drafted = results[target], results[f"{target} with drafts"]
    assert [s["tokens"] for s in drafted["sequences"]] == [s["tokens"] for s in plain["sequences"]]
    assert drafted["drafted"] > 0
    assert drafted["accepted"] > drafted["drafted"] / 8  # of a chance draft one in a vocabulary would be


@pytest.mark.parametrize(
    ("name", "predicted"),
    [
        ("model.layers.3.mlp.experts", False),
        ("model.layers.4.mlp.experts", True),
        ("mtp.layers.0.mlp.experts", True),
        ("model.mtp_block.0.mlp.experts", True),
        ("model.layers.1.mlp.experts", False),
    ],
)
def test_layers_beyond_the_last_predict(name: str, predicted: bool) -> None:
    """All other layers that the manifest does not have stay an error."""
    from vllm_ext.prediction import predicts

    assert predicts(name, 4) == predicted


def test_an_unknown_layer_is_no_prediction_layer() -> None:
    from vllm_ext.prediction import predicts
    from vllm_ext.weight_loading import LayerNames

    name = "model.layers.2.mlp.experts"
    assert not predicts(name, 4)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts.*describes model\.layers\.3"):
        LayerNames(["model.layers.3.mlp.experts"]).find(name)


def test_prediction_layers_must_be_in_the_checkpoint() -> None:
    """vLLM would draft with whatever its memory holds: it looks for missing tensors in dense models only."""
    from vllm_ext.prediction import check_stored

    prefix, own = (
        "model.layers.2.mlp.experts",
        ["model.embed_tokens.weight", "model.layers.1.mlp.gate.weight"],
    )
    check_stored(prefix, 2, [*own, "model.layers.2.eh_proj.weight"])
    with pytest.raises(ConfigError, match=r"no tensors of prediction layers.*layers\.2"):
        check_stored(prefix, 2, own)
