"""Options of commands that say where models are found and how conversations become text."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.options import OPTIONS

OWN: dict[str, Any] = {"revision": None, "subfolder": ""}
"""Options of ``ModelSource`` that a model and its reference have each for itself."""


def add_source(parser: Any, reference: bool = False, model: bool = True) -> None:
    """Where models of the hub are found; not ``--token``, which other users of the machine would see."""
    group = parser.add_argument_group(
        "where models are found",
        "for models on the hub; its token is that of the environment, HF_TOKEN, or of `hf auth login`",
    )
    for of, prefix in (("", ""),) * model + (("of --reference: ", "reference-"),) * reference:
        text = f"{of}branch, tag or commit"
        group.add_argument(f"--{prefix}revision", metavar="NAME", help=text)
        text = f"{of}folder of the repository, or of a directory, with the model and its tokenizer"
        group.add_argument(f"--{prefix}subfolder", default="", metavar="DIR", help=text)
    group.add_argument("--cache-dir", metavar="DIR", help="where files of the hub are kept")
    text = "run the code that a tokenizer brings along (that of models is never run)"
    group.add_argument("--trust-remote-code", action="store_true", help=text)


def add_chat_template(parser: Any) -> None:
    """Arguments for the template of conversations."""
    row = OPTIONS["chat_template_kwargs"]
    text = f"{row.help}, like '{{\"enable_thinking\": false}}'"
    parser.add_argument("--chat-template-kwargs", type=_json_object, metavar=row.flag, help=text)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


def source_of(args: argparse.Namespace, of: str = "model") -> ModelSource:
    """Where the model, or with ``of="reference"`` that one, is found."""
    from bitsmoe_plugin.models.model_source import ModelSource

    prefix = "" if of == "model" else f"{of}_"
    own = {name: getattr(args, prefix + name, default) for name, default in OWN.items()}
    return ModelSource.of(
        getattr(args, of), cache_dir=args.cache_dir, trust_remote_code=args.trust_remote_code, **own
    )
