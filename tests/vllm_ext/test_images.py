"""Packed multimodal models in vLLM's engine, asked with images, against the transformers runtime."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from multimodal_support import END, IMAGE, START, build
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoModelForMultimodalLM, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil
from vllm_support import ENVIRONMENT, TOLERANCE, needs_vllm, run_vllm

from bitsmoe_plugin import BitsMoEConfig

APART = Path(sys.prefix) / "torchvision"
"""torchvision for GPUs, see Makefile; where an environment has one of its own, that is taken."""
OPERATORS = Path(__file__).parents[1] / "support" / "torchvision_operators"
pytestmark = [
    needs_vllm,
    pytest.mark.filterwarnings("ignore:.*calibration token"),
    pytest.mark.skipif(
        importlib.util.find_spec("torchvision") is None and not APART.is_dir(),
        reason="vLLM's classes for images need torchvision; run make install-torchvision",
    ),
]
TEXT = list(range(10, 40))
apart = importlib.util.find_spec("torchvision") is None
PYTHON_PATH = os.pathsep.join(map(str, (APART, OPERATORS))) if apart else ""
ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
OTHERS = {"qwen3_5_moe": "bfloat16", "glm4v_moe": "float32"}
"""Family -> dtype: linear attention on a CPU takes bfloat16 alone in vLLM."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL-MoE, with the files that its processor is made from."""
    folder = tmp_path_factory.mktemp("images")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    model = build(
        "qwen3_vl_moe", rope_parameters=rope, norm_topk_prob=True, head_dim=32
    )  # a size that vLLM's attention knows
    model.save_pretrained(folder / "dense")
    tokens = torch.randint(10, 64, (16, 32), generator=torch.Generator().manual_seed(1))
    config = BitsMoEConfig(bits=4, dataset=tokens.tolist(), sequence_length=32)
    quantized = AutoModelForMultimodalLM.from_pretrained(folder / "dense", quantization_config=config)
    quantized.save_pretrained(folder / "packed")
    tokenizer().save_pretrained(folder / "packed")
    processor().save_pretrained(folder / "packed")
    return folder / "packed"


def tokenizer() -> PreTrainedTokenizerFast:
    """Words, and the special tokens that vLLM and the processor of this family write."""
    special = {"<|image_pad|>": IMAGE, "<|video_pad|>": 4, "<|vision_start|>": START, "<|vision_end|>": END}
    words = {f"w{token}": token for token in range(64) if token not in special.values()}
    model = Tokenizer(WordLevel({**special, **words}, unk_token="w2"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, extra_special_tokens=list(special), pad_token="w0")


def processor() -> Any:
    """Patches of 4 x 4 pixels, four of them to a token; images keep their size."""
    return Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
    )


def test_images_give_what_they_give_in_transformers(packed: Path, tmp_path: Path) -> None:
    """Guards the experts of image tokens, and the names of a multimodal model's layers in vLLM."""
    random, images = np.random.default_rng(0), []
    for i, shape in enumerate([(16, 16, 3), (24, 32, 3)]):
        images.append(Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8)))
        images[-1].save(tmp_path / f"{i}.png")
    prompts = [[*TEXT[:9], START, IMAGE, END, *TEXT[9:20]], [START, IMAGE, END, *TEXT], TEXT]
    files = [[str(tmp_path / "0.png")], [str(tmp_path / "1.png")], []]
    job = {"model": str(packed), "prompts": prompts, "images": files, "max_tokens": 8}
    job["options"] = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 1, "video": 0}}
    (found,) = run_vllm([job], tmp_path, PYTHON_PATH)
    model = AutoModelForMultimodalLM.from_pretrained(packed, dtype=torch.float32).eval()
    sizes = [4, 12, 0]
    for sequence, image, tokens in zip(found["sequences"], [*images, None], sizes, strict=True):
        assert sequence["prompt"].count(IMAGE) == tokens
        off, behind = differences(model, sequence, image)
        assert float(off.max()) < TOLERANCE
        assert float(behind.max()) < TOLERANCE
    plain = log_probabilities(model, found["sequences"][0], Image.fromarray(np.zeros((16, 16, 3), np.uint8)))
    seen = log_probabilities(model, found["sequences"][0], images[0])
    assert float((plain - seen).abs().max()) > 100 * TOLERANCE  # what is seen matters


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", OTHERS)
def test_images_to_other_families(family: str, tmp_path: Path) -> None:
    """With processors of transformers, whose inputs vLLM's own classes take."""
    from vllm_images import FAMILIES

    support("make", family, str(tmp_path))
    files, random, seen = [], np.random.default_rng(0), list(FAMILIES[family].prompt)
    for i, shape in enumerate([(16, 16, 3), (24, 32, 3)]):
        Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    prompts = [[*TEXT[:9], *seen, *TEXT[9:20]], [*seen, *TEXT], TEXT]
    images = [*([file] for file in files), []]
    options = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 1, "video": 0}}
    options |= {"dtype": OTHERS[family], "enable_prefix_caching": False}
    model = str(tmp_path / "packed")
    job = {"model": model, "prompts": prompts, "images": images, "max_tokens": 8, "options": options}
    (found,) = run_vllm([job], tmp_path, PYTHON_PATH)
    given = json.dumps(found["sequences"]), json.dumps([*files, ""])
    judged = json.loads(support("judge", family, model, *given).splitlines()[-1])
    tolerance = TOLERANCE if OTHERS[family] == "float32" else 0.25  # measured 0.11, 0.007 in the mean
    for sequence, values, file in zip(found["sequences"], judged, [*files, ""], strict=True):
        assert (sequence["prompt"].count(IMAGE) > 1) == bool(file)
        said = torch.tensor(sequence["prompt_logprobs"] + sequence["logprobs"])
        assert float((said - torch.tensor(values[: len(said)])).abs().max()) < tolerance
        assert max(values[len(said) :]) < tolerance


def support(*arguments: str) -> str:
    """What ``vllm_images.py`` prints, with torchvision."""
    path = os.pathsep.join((str(ROOT), str(SUPPORT), PYTHON_PATH))
    command = [sys.executable, str(SUPPORT / "vllm_images.py"), *arguments]
    environment = {**ENVIRONMENT, "PYTHONPATH": path}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


@torch.no_grad()
def log_probabilities(model: Any, sequence: dict[str, Any], image: Image.Image | None) -> Tensor:
    """``[n, vocabulary]`` of the token after each."""
    tokens = torch.tensor([sequence["prompt"] + sequence["tokens"]])
    seen = processor()(images=[image], return_tensors="pt") if image else {}
    kind = {"mm_token_type_ids": tokens.eq(IMAGE).long()} if image else {}
    return model(input_ids=tokens, **seen, **kind).logits[0].float().log_softmax(-1)


def differences(model: Any, sequence: dict[str, Any], image: Image.Image | None) -> tuple[Tensor, Tensor]:
    """As ``vllm_support.differences``, for the tokens behind an image and those that are generated."""
    expected = log_probabilities(model, sequence, image)[:-1]
    tokens = torch.tensor(sequence["prompt"] + sequence["tokens"])[1:]
    chosen = expected.gather(1, tokens[:, None])[:, 0]
    found = torch.tensor(sequence["prompt_logprobs"] + sequence["logprobs"])
    made = len(sequence["tokens"])
    return (chosen - found).abs(), (expected.max(-1).values - chosen)[-made:]
