"""Uploading a packed model and loading it from the hub's cache, without a network: a directory is the hub."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoUrl, constants
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitsmoe_plugin.runtime.experts import BitsMoEExperts

NAME, REVISION = "someone/moe-tiny-2bit", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Where files go that are uploaded."""
    repository = tmp_path / "repository"
    repository.mkdir()

    def commit(self, repo_id, operations, **options):
        assert repo_id == NAME
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, repository / operation.path_in_repo)

    def card(*args, **options):
        if not (repository / "README.md").exists():
            raise EntryNotFoundError("a new repository")
        return ModelCard((repository / "README.md").read_text())

    address = RepoUrl(f"https://huggingface.co/{NAME}")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **options: address)
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(ModelCard, "load", card)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository


def downloaded(repository: Path, cache: Path) -> Path:
    """The cache of the hub after a download: links from a snapshot to blobs."""
    folder = cache / f"models--{NAME.replace('/', '--')}"
    for name in ("refs", "blobs", f"snapshots/{REVISION}"):
        (folder / name).mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    for number, file in enumerate(repository.iterdir()):
        shutil.copy(file, folder / "blobs" / str(number))
        (folder / "snapshots" / REVISION / file.name).symlink_to(f"../../blobs/{number}")
    return cache


def check_loads_the_same(cache: Path, packed: Path) -> None:
    options = {"cache_dir": cache, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(NAME, **options).eval()
    assert any(isinstance(module, BitsMoEExperts) for module in model.modules())
    tokens = AutoTokenizer.from_pretrained(NAME, **options)("In the beginning", return_tensors="pt").input_ids
    wanted = AutoModelForCausalLM.from_pretrained(packed).eval()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, wanted(tokens).logits)


def test_push_to_hub_uploads_what_loads_again(hub, packed_moe_tiny, tmp_path) -> None:
    """As with any model of transformers, whose generic card gets our tags: the hub finds it by them."""
    AutoModelForCausalLM.from_pretrained(packed_moe_tiny).push_to_hub(NAME)
    AutoTokenizer.from_pretrained(packed_moe_tiny).push_to_hub(NAME)
    names = {file.name for file in hub.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= names
    assert (hub / "model.safetensors").read_bytes() == (packed_moe_tiny / "model.safetensors").read_bytes()
    tags = ModelCard((hub / "README.md").read_text()).data.tags
    assert {"bitsmoe", "quantized"} <= set(tags)
    check_loads_the_same(downloaded(hub, tmp_path / "cache"), packed_moe_tiny)
