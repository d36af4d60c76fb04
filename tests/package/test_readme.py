"""What README.md and the documents tell users to type: commands that parse, code that compiles, links that
lead somewhere. That they do what is said is shown by the tests of each command."""

import re
import shlex
from pathlib import Path

import pytest

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.cli import build_parser, parse_options

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "examples", ROOT / "examples" / "docs")
DOCUMENTS = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in folder.glob("*.md"))]
NAMES = [document.relative_to(ROOT).as_posix() for document in DOCUMENTS]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)


def blocks(document: Path, language: str) -> list[str]:
    """Fenced code of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[list[str]]:
    """Words of each command of the shell blocks, without comments and variables."""
    text = "".join(blocks(document, "sh")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [[word for word in line if not re.match(r"[A-Z_]+=", word)] for line in lines if line]


@each_document
def test_our_commands_parse(document) -> None:
    for words in commands(document):
        if words[:3] == [".venv/bin/torchrun", "--nproc-per-node", "2"]:
            words = ["bitsmoe", *words[5:]]
        if Path(words[0]).name == "bitsmoe":
            arguments = words[1 : words.index(">") if ">" in words else None]
            args = build_parser().parse_args(arguments)
            BitsMoEConfig(**parse_options(getattr(args, "option", [])))


@each_document
def test_make_has_the_targets(document) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"`make ([a-z0-9-]+)", document.read_text())
    targets += [words[1] for words in commands(document) if words[0] == "make"]
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []


@each_document
def test_python_code_compiles_and_its_imports_exist(document) -> None:
    for code in blocks(document, "python"):
        compile(code, document.name, "exec")
        for line in re.findall(r"^from bitsmoe_plugin\S* import .*$", code, re.MULTILINE):
            exec(line, {})


@each_document
def test_links_and_files_that_are_named_exist(document) -> None:
    text = document.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)|src(?:set)?=\"([^\"]+)\"", text)
    missing = [link for pair in links for link in pair if link and not (document.parent / link).exists()]
    named = re.findall(r"\bexamples/[\w/.-]*\w", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []
