"""A program for torchrun: packed models spread over two processes by transformers; prints what came out."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from bitsmoe_plugin import BitsMoEConfig

IDS = torch.arange(5, 60)[None]
SPREAD: dict[str, dict[str, Any]] = {
    "tensor": {"tp_size": 2},
    "expert": {"tp_size": 2, "ep_size": 2},
    "pipeline": {"pp_size": 2},
    "data": {"fsdp_size": 2},
}


def load(model: str, **spread: Any) -> Any:
    more = {"distributed_config": DistributedConfig(**spread)} if spread else {}
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **more)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of the router and of what lies before and behind the experts."""
    model(IDS, labels=IDS).loss.backward()
    names = ("model.embed_tokens.weight", "model.layers.1.mlp.gate.weight", "model.norm.weight")
    found = {name: model.get_parameter(name).grad for name in names}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def refusal(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def outcomes(packed: str, dense: str, biased: str, odd: str, saved: str) -> dict[str, Any]:
    alone = load(packed)
    wanted, found = logits(alone), {}
    for name, spread in SPREAD.items():
        model = load(packed, **spread)
        found[name] = distance(logits(model), wanted)
        found[f"{name} words"] = sum(p.numel() for n, p in model.named_parameters() if "bitsmoe_payload" in n)
        found[f"{name} parameters"] = model.num_parameters() - alone.num_parameters()
        if name == "tensor":
            model.save_pretrained(saved)
            found["dequantize"] = refusal(model.dequantize)
        if name in ("pipeline", "data"):
            found[f"{name} saved"] = refusal(lambda model=model: model.save_pretrained(f"{saved}-not"))
    wanted_gradients = gradients(alone)
    for name in ("tensor", "expert"):
        own = gradients(load(packed, **SPREAD[name]))
        found[f"{name} gradients"] = max(distance(own[n], g) for n, g in wanted_gradients.items())
        found[f"{name} biased"] = distance(
            logits(load(biased, **SPREAD[name]), IDS % 64), logits(load(biased), IDS % 64)
        )
    replicated = torch.nn.parallel.DistributedDataParallel(alone)
    found["replicated"] = distance(logits(replicated), wanted)
    plan = {"model.layers.*.mlp.experts": "moe_tp_experts"}
    config = BitsMoEConfig(dataset=[[1, 2, 3]])
    two = DistributedConfig(tp_size=2)
    return found | {
        "rows": refusal(lambda: load(odd, tp_size=2)),
        "experts": refusal(lambda: load(odd, tp_size=2, ep_size=2)),
        "plan": refusal(lambda: load(packed, tp_size=2, tp_plan=plan)),
        "quantize": refusal(
            lambda: AutoModelForCausalLM.from_pretrained(
                dense, quantization_config=config, distributed_config=two
            )
        ),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    result = outcomes(*sys.argv[1:6])
    if os.environ["RANK"] == "0":
        print("OUTCOMES", json.dumps(result), flush=True)
