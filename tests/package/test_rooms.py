"""The rooms of the package: what each may import is in pyproject.toml (`make lint`); here is what that cannot
say."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "bitsmoe_plugin"
CORE = {"spectral": set(), "allocation": {"highspy"}, "rounding": set(), "codec": {"triton"}}
"""Rooms of the numerical core -> what they import besides torch, numpy and the standard library."""
FACTORIES = {
    *("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"),
    *("scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}
NOT_FOR_THE_CORE = {"argparse", "subprocess", "socket", "urllib", "http"}


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """All of a file's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def dotted(node: ast.AST) -> str:
    """A name as it is written, from its first part that is none; "" if its last is none."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imported(path: Path) -> set[str]:
    """Top-level names of all that a file imports, wherever in it."""
    nodes = nodes_of(path)
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("room", CORE)
def test_the_core_imports_numbers_alone(room: str) -> None:
    """Guards the core against libraries that nobody thought of forbidding."""
    allowed = {"bitsmoe_plugin", "torch", "numpy", *CORE[room], *(sys.stdlib_module_names - NOT_FOR_THE_CORE)}
    files = list((PACKAGE / room).rglob("*.py"))
    assert len(files) > 4
    surplus = {f"{path.relative_to(ROOT)}: {name}" for path in files for name in imported(path) - allowed}
    assert not surplus


@pytest.mark.parametrize("room", [*CORE, "calibration", "pipeline"])
def test_tensors_are_made_on_a_device_that_is_named(room: str) -> None:
    """Guards tensors that are right only where an ambient device is set, or none is."""
    made, unnamed = 0, set()
    for path in (PACKAGE / room).rglob("*.py"):
        for node in nodes_of(path):
            if isinstance(node, ast.Call) and dotted(node.func) in {f"torch.{name}" for name in FACTORIES}:
                made += 1
                if "device" not in {keyword.arg for keyword in node.keywords}:
                    unnamed.add(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert made > 1
    assert not unnamed


def test_large_dataclasses_are_built_by_keyword() -> None:
    """Guards fields of one type that are given in the wrong order: of a class of more than five, by name."""
    files = [path for package in ("bitsmoe_plugin", "vllm_ext") for path in (ROOT / package).rglob("*.py")]
    fields: dict[str, int] = {}
    for node in (node for path in files for node in nodes_of(path)):
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            own = sum(isinstance(part, ast.AnnAssign) for part in node.body)
            fields[node.name] = min(own, fields.get(node.name, own))  # of two of one name, the smaller
    large = {name for name, count in fields.items() if count > 5}
    assert len(large) > 20
    positional = {
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node.func)}"
        for path in files
        for node in nodes_of(path)
        if isinstance(node, ast.Call) and node.args and dotted(node.func).rpartition(".")[2] in large
    }
    assert not positional


def test_each_room_says_what_goes_in_and_what_comes_out() -> None:
    """Guards rooms without a purpose, and more of them than a reader keeps in mind."""
    rooms = [path.parent for path in PACKAGE.glob("*/__init__.py")]
    assert len(rooms) <= 12
    for room in rooms:
        text = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert re.search(r"\bin\b.*\bout\b", text, re.DOTALL), f"{room.name}: {text!r}"


def test_every_package_is_listed() -> None:
    """Guards against folders that run from a checkout and are missing from the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "packages"
    ]
    files = [
        path for package in ("bitsmoe_plugin", "vllm_ext") for path in (ROOT / package).rglob("__init__.py")
    ]
    found = [".".join(path.parent.relative_to(ROOT).parts) for path in files]
    assert sorted(listed) == sorted([*found, "optimum.commands.register"])
    assert len(set(listed)) == len(listed)


def texts() -> list[Path]:
    """Files in which modules are named: sources, tests, documents, settings."""
    folders = ("bitsmoe_plugin", "vllm_ext", "tests", "examples", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [ROOT / name for name in ("pyproject.toml", "Makefile", "README.md")]
    return [
        path
        for path in files
        if path.suffix in {".py", ".md", ".c", ".h", ".toml", ".html", ""} and path.is_file()
    ]


@cache
def defined(path: Path) -> set[str]:
    """What a module has: definitions and imports, wherever in it, and parts of a package."""
    nodes = nodes_of(path)
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name)}
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return names | {alias.asname or alias.name for node in imports for alias in node.names}


def exists(name: str) -> bool:
    """Whether a dotted name is a module of ours, or something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:count])
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                return count == len(parts) or parts[count].startswith("__") or parts[count] in defined(path)
    return False


def test_every_module_that_is_named_exists() -> None:
    """Guards strings that no import checks: ``-m`` of child processes, what tests patch by name, entry
    points, settings of mypy and the build, documents."""
    built = {"bitsmoe_plugin.base.native._cpu"}
    missing = set()
    for path in texts():
        for match in re.finditer(
            r"\b(?:bitsmoe_plugin|vllm_ext)((?:\.[a-zA-Z_]\w*)+)", path.read_text(encoding="utf-8")
        ):
            name = match[0].removesuffix(".py")
            if name not in built and not exists(name):
                missing.add(f"{path.relative_to(ROOT)}: {name}")
    assert not missing


def test_every_path_that_is_named_exists() -> None:
    """Guards comments, documents and settings that name files by their path."""
    missing = set()
    for path in texts():
        pattern = r"\b(?:bitsmoe_plugin|vllm_ext|tests)(?:/[\w*]+)*/[\w*]+\.(?:py|c|h|json|html|css)\b"
        for match in re.finditer(pattern, path.read_text(encoding="utf-8")):
            if not list(ROOT.glob(match[0])):
                missing.add(f"{path.relative_to(ROOT)}: {match[0]}")
    text = (ROOT / "examples/docs/how_it_works.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)*\w+\.py)`", text)
    assert len(named) > 20
    missing |= {
        name
        for name in named
        if not any((folder / name).is_file() for folder in (PACKAGE, ROOT / "vllm_ext"))
    }
    assert not missing


def test_peers_are_run_by_the_names_of_their_modules() -> None:
    """Guards the child processes of ``bitsmoe compare``: the names are put together where they are
    started."""
    from bitsmoe_plugin.commands.compare.runners import RUNNERS

    modules = {runner.args[0] for runner in RUNNERS.values() if hasattr(runner, "args")}
    assert modules == {"gptq_quantize", "autoround_quantize"}
    for module in modules:
        source = PACKAGE / "commands" / "compare" / f"{module}.py"
        assert 'if __name__ == "__main__":' in source.read_text(encoding="utf-8"), module
