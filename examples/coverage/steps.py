"""What one model class must get through in transformers: ``steps(entry, folder)``.

The folder then holds ``packed``, the dense model that it stands for (``plain``), and ``reference.json``, what
vLLM is compared with.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from model_classes import ModelClass
from published import as_published
from recipes import BFLOAT16
from small_models import small_model

from bitsmoe_plugin import BitsMoEConfig, BitsMoEError
from bitsmoe_plugin.integrations.dequantize_checkpoint import dequantize_checkpoint
from bitsmoe_plugin.models.families import find_moe_layers
from bitsmoe_plugin.models.model_class import auto_class, load_model, text_model
from bitsmoe_plugin.runtime.experts import BitsMoEExperts

STEPS = ("built", "accepted", "quantized", "reloaded", "generates")
PROMPTS = [[5, 6, 7, 11, 13, 60, 61, 62, 3, 9], [17, 30, 2], [44, 45] * 20]
NEW_TOKENS = 8


class Failed(Exception):
    """What a step found."""


def steps(entry: ModelClass, folder: Path) -> dict[str, str]:
    """Name of each step that was reached -> "yes", or why not; the last one alone can have failed."""
    run, found = _Run(entry, folder), {}
    for name in STEPS:
        try:
            step: Callable[[], None] = getattr(run, name)
            step()
        except (Failed, BitsMoEError) as error:
            found[name] = str(error)
        except Exception as error:  # of transformers, of any kind: it is a result here
            found[name] = f"{type(error).__name__}: {error}"
        if name in found:
            break
        found[name] = "yes"
    return found


class _Run:
    def __init__(self, entry: ModelClass, folder: Path) -> None:
        self.entry, self.folder = entry, folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def built(self) -> None:
        """With random weights, saved, and it computes."""
        self.model = small_model(self.entry)
        self.dense = _logits(self.model)
        self.model.save_pretrained(self.folder / "dense")

    def accepted(self) -> None:
        """Its structure is known."""
        self.layers = len(find_moe_layers(self.model))
        self.names = sorted(self.model.state_dict())
        del self.model

    def quantized(self) -> None:
        """All experts are packed, and it still computes about the same."""
        self.packed = self._load("dense", quantization_config=_options())
        packed = sum(isinstance(module, BitsMoEExperts) for module in self.packed.modules())
        if packed != self.layers:
            raise Failed(f"{packed} of {self.layers} MoE layers are packed")
        self.error = _relative(_logits(self.packed), self.dense)
        if not self.error < 0.3:
            raise Failed(f"logits of the 8-bit model differ by {self.error:.2f}")

    def reloaded(self) -> None:
        """Saved and loaded it gives the same bits; written densely it keeps its tensors."""
        self.packed.save_pretrained(self.folder / "packed")
        again = self._load("packed")
        if not torch.equal(_logits(again), _logits(self.packed)):
            raise Failed("logits differ after saving and loading")
        self.packed = again
        dequantize_checkpoint(self.folder / "packed", self.folder / "plain")

    def generates(self) -> None:
        """Tokens with the key-value cache are those without; they are kept for vLLM to be compared with."""
        sequences = [_greedy(self.packed, prompt) for prompt in PROMPTS]
        if self.entry.model_type in BFLOAT16:
            rounded = self._load("plain", dtype=torch.bfloat16)
            for sequence in sequences:
                sequence["rounding"] = _rounding(rounded, sequence)
        as_published(self.entry, self.packed.config, self.folder / "plain", self.folder / "packed")
        (self.folder / "reference.json").write_text(json.dumps(sequences))
        model = text_model(self.packed)
        if not model.can_generate():
            raise Failed("the class does not generate")
        out = model.generate(
            torch.tensor([PROMPTS[0]]), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
        )
        if out.shape[1] < 4:
            raise Failed(f"generated {out.shape[1]} tokens")

    def _load(self, name: str, **options: Any) -> Any:
        model = load_model(self.folder / name, **options).eval()
        if type(model).__name__ != self.entry.name:
            raise Failed(f"the auto class {auto_class(model.config).__name__} loads {type(model).__name__}")
        return model


def _options() -> BitsMoEConfig:
    tokens = torch.randint(2, 64, (16, 32), generator=torch.Generator().manual_seed(1))
    return BitsMoEConfig(bits=8, basis_group_size=16, dataset=tokens.tolist(), sequence_length=32)


def _logits(model: Any) -> torch.Tensor:
    tokens = torch.tensor([PROMPTS[0]])
    others = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return text_model(model)(tokens, **others).logits.float()


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@torch.no_grad()
def _greedy(model: Any, prompt: list[int]) -> dict[str, Any]:
    """Greedy tokens without a cache, log-probabilities of all tokens but the first, and by how much each
    chosen token leads the next best."""
    tokens, leads = list(prompt), []
    for _ in range(NEW_TOKENS):
        found = text_model(model)(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        best = found[-1].topk(2)
        tokens.append(int(best.indices[0]))
        leads.append(float(best.values[0] - best.values[1]))
    values = found[:-1].gather(1, torch.tensor(tokens[1:-1])[:, None])[:, 0].tolist()
    values.append(float(best.values[0]))
    return {"tokens": tokens, "prompt": len(prompt), "logprobs": values, "leads": leads}


@torch.no_grad()
def _rounding(model: Any, sequence: dict[str, Any]) -> float:
    """By how much log-probabilities of a model in bfloat16 differ from a sequence's, at most: rounding, and
    routers that choose other experts after it."""
    tokens = torch.tensor([sequence["tokens"]])
    found = text_model(model)(tokens).logits[0, :-1].float().log_softmax(-1)
    chosen = found.gather(1, tokens[0, 1:, None])[:, 0]
    return float((chosen - torch.tensor(sequence["logprobs"])).abs().max())
