"""Make the cloze task ``last_word`` of `bitsmoe evaluate --tasks last_word` from the bundled evaluation text.

    python examples/make_last_word.py            # rewrites the task's file; the same bytes each time
    python examples/make_last_word.py --check    # only says whether it is what this script makes

An example is the last word of a sentence, given the sentence and those before it. Sources are the books in
examples/data/eval.jsonl that are in the public domain (data/SOURCES.md). No sentence of the calibration text
is used, and no model is asked which words are easy.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
FILE = Path(__file__).parents[1] / "bitsmoe_plugin" / "commands" / "bundled_tasks" / "last_word.jsonl"
DOMAINS = ("fiction", "religion")
"""Of which all documents are books in the public domain."""
LEAST, ENOUGH = 30, 50
"""Words before the last one: an example has at least LEAST, and whole sentences until there are ENOUGH."""
_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"']))\s+(?=[\"'A-Z])")
_LAST = re.compile(r"^(?P<before>.*[a-z,;]) (?P<word>[a-z]{3,})[.!?][\"']?$")
_ABBREVIATION = re.compile(r"\b(Mr|Mrs|Dr|St|Messrs|Rev|Sir|vol|ver|v|Ps|Psa|etc|[A-Z])\.$")


def sentences(text: str) -> list[str]:
    """Sentences of a text, white space between words made one space."""
    found: list[str] = []
    joined = False
    for piece in _END.split(" ".join(text.split())):
        if joined:
            found[-1] += f" {piece}"
        else:
            found.append(piece)
        joined = _ABBREVIATION.search(piece) is not None
    return found


def examples(document: dict[str, str], seen: set[str]) -> Iterator[dict[str, str]]:
    """Examples of one document, in its order.

    Args:
        seen: sentences that must not be asked for.
    """
    parts = sentences(document["text"])
    for place, sentence in enumerate(parts):
        last = _LAST.match(sentence)
        if last is None or sentence in seen:
            continue
        context, start = last["before"], place
        while len(context.split()) < ENOUGH and start > 0:
            start -= 1
            context = f"{parts[start]} {context}"
        if len(context.split()) < LEAST:
            continue
        source = {name: document[name] for name in ("domain", "source", "id")}
        yield {"text": context, "word": last["word"], **source}


def read(name: str) -> list[dict[str, Any]]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def build() -> bytes:
    """The file."""
    seen = {sentence for row in read("calibration.jsonl") for sentence in sentences(row["text"])}
    documents = [row for row in read("eval.jsonl") if row["domain"] in DOMAINS]
    found = [example for document in documents for example in examples(document, seen)]
    return "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in found).encode()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is another")
    if not parser.parse_args().check:
        FILE.write_bytes(build())
    elif FILE.read_bytes() != build():
        print(f"{FILE} is not what this script makes", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
