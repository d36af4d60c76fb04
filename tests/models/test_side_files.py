"""What lies beside a model's weights goes with it, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.models.side_files import copy_side_files, side_files

CARRIED = {
    "LICENSE",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.model",
    "video_preprocessor_config.json",
}
LEFT = {
    ".gitattributes",
    "README.md",
    "adapter_config.json",
    "config.json",
    "model.onnx",
    "model.safetensors",
    "model.safetensors.index.json",
    "params.json",
    "pytorch_model.bin.index.json",
    "quantize_config.json",
    "tokenizer.py",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    for name in CARRIED | LEFT:
        (path / name).write_text(name)
    (path / "original.json").mkdir()
    return path


@pytest.mark.parametrize("trusted", [False, True])
def test_which_files_are_carried(folder: Path, trusted: bool) -> None:
    """Guards against lost processors, against indexes of weights that are not there, and against code that
    nobody allowed."""
    found = {path.name for path in side_files(ModelSource(str(folder), trust_remote_code=trusted))}
    assert found == CARRIED | ({"tokenizer.py"} if trusted else set())


def test_a_link_out_of_the_directory_is_left_out(folder: Path, tmp_path: Path) -> None:
    """Guards against a checkpoint of others that has a private file published."""
    (tmp_path / "secret").write_text("secret")
    (folder / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.warns(UserWarning, match=r"not carried over: .*vocab\.json leads out"):
        found = side_files(ModelSource(str(folder)))
    assert {path.name for path in found} == CARRIED


def test_what_was_saved_anew_stays(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "generation_config.json").write_text("anew")
    files = side_files(ModelSource(str(folder)))
    copy_side_files(files, out)
    assert {path.name for path in out.iterdir()} == CARRIED
    assert (out / "generation_config.json").read_text() == "anew"
    copy_side_files(files, out, replace=True)
    assert (out / "generation_config.json").read_text() == "generation_config.json"
