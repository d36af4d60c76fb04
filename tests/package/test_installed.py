"""What modules of an installed package find beside them."""

from __future__ import annotations

from pathlib import Path

from wheel_support import run_python


def test_the_compiled_library_is_found_and_counts(installed_wheel: Path, tmp_path: Path) -> None:
    """Guards the loader and the build against each other, which name the same place: without the library
    everything works, many times slower. And a run that it computed must not be continued with another."""
    code = (
        "from bitsmoe_plugin.base import native; from bitsmoe_plugin.pipeline import run_identity\n"
        "from pathlib import Path; library = Path(native.library()._name)\n"
        "print(library.parent, native.select(None), library in run_identity.source_files())"
    )
    done = run_python(installed_wheel, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder, instructions, counts = done.stdout.split()
    assert Path(folder) == installed_wheel / "bitsmoe_plugin" / "base" / "native"
    assert instructions in ("avx512", "avx2", "portable")
    assert counts == "True"
