"""What binds the work of a run to the code that did it."""

from __future__ import annotations

import sys
from pathlib import Path

import bitsmoe_plugin
from bitsmoe_plugin import cli
from bitsmoe_plugin.base import native
from bitsmoe_plugin.pipeline import run_identity

ROOT = Path(bitsmoe_plugin.__file__).parent


def test_all_code_of_the_package_counts() -> None:
    """Guards runs that go on with layers of other code because a folder was left out: everything that is
    loaded, and what the compiled library was made of, must be among the files whose digest is taken."""
    files = set(run_identity.source_files())
    assert cli.__name__ in sys.modules
    ours = [module for name, module in sys.modules.items() if name.partition(".")[0] == "bitsmoe_plugin"]
    loaded = {Path(module.__file__) for module in ours if module.__file__}
    assert len(loaded) > 20
    assert loaded <= files
    sources = set((ROOT / "base" / "native" / "csrc").iterdir())
    assert len(sources) > 10
    assert sources <= files
    if native.library() is not None:
        assert any(path.suffix == ".so" for path in files)
    assert {path.relative_to(ROOT).parts[0] for path in files} >= {
        "codec",
        "rounding",
        "spectral",
        "errors.py",
    }


def test_any_change_of_code_is_seen(monkeypatch, tmp_path: Path) -> None:
    """Guards the digest against files that are listed and not read, and against files that trade places."""
    first, second = tmp_path / "first.py", tmp_path / "folder" / "second.py"
    second.parent.mkdir()
    monkeypatch.setattr(run_identity, "_ROOT", tmp_path)
    seen = set()
    for texts in (("a", "b"), ("b", "a"), ("a", "c"), ("c", "b")):
        for path, text in zip((first, second), texts, strict=True):
            path.write_text(text)
        run_identity._sources.cache_clear()
        seen.add(run_identity._sources())
    run_identity._sources.cache_clear()
    assert len(seen) == 4
