"""A model writes calibration text itself, where there is little of others: ``bitsmoe write``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from bitsmoe_plugin.base.atomic_output import replace_file
from bitsmoe_plugin.base.error_lines import working_on
from bitsmoe_plugin.base.interruption import kept_unless_finished
from bitsmoe_plugin.base.option_checks import check_number
from bitsmoe_plugin.base.process_state import known_state
from bitsmoe_plugin.base.work_directory import WorkDirectory, remove, writing
from bitsmoe_plugin.base.workers import refuse_several
from bitsmoe_plugin.calibration.text import check_vocabulary, load_documents, token_stream
from bitsmoe_plugin.commands.defaults import PROMPT, WRITTEN, WRITTEN_AT_ONCE
from bitsmoe_plugin.commands.evaluate import load_for_evaluation
from bitsmoe_plugin.errors import ConfigError, QuantizationError
from bitsmoe_plugin.models.low_precision import READ, method_of, stored_settings
from bitsmoe_plugin.models.model_class import check_loadable, text_model
from bitsmoe_plugin.models.model_source import ModelSource
from bitsmoe_plugin.models.tokenizer import load_tokenizer
from bitsmoe_plugin.pipeline.run_identity import writing_identity


class _Bar(BaseStreamer):
    """Counts tokens as they are written."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def put(self, value: Tensor) -> None:
        self._bar.update(value.numel())

    def end(self) -> None:
        """The bar goes on with the next batch."""


class _Finite(LogitsProcessor):
    """Refuses logits that nothing can be sampled by; -inf alone only leaves a token out."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not scores.amax(-1).isfinite().all():
            raise QuantizationError(
                "the model's outputs are not finite, so it cannot write; if it computes in float16, set "
                '"dtype" in config.json to float32'
            )
        return scores


@known_state()
def write_text(
    model: str | ModelSource,
    out: str | Path,
    dataset: Any,
    tokens: int,
    *,
    sequence_length: int = WRITTEN,
    prompt_tokens: int = PROMPT,
    batch_size: int = WRITTEN_AT_ONCE,
    temperature: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
) -> int:
    """Let a model go on from short pieces of text, and write what it says as a dataset of token ids.

    Each next token is sampled from all of the vocabulary. The end-of-text token is one of them: it ends
    no sequence, the model goes on with another document, as in the joined documents of calibration. Prompts
    begin anywhere in the joined documents. The same arguments give the same file on the same machine; another
    ``batch_size`` gives other text. The process's random numbers stay as they were.

    Finished batches are kept in a directory, ``out`` with ".work" appended, until all is done: the same call
    goes on there if this one ends early, and gives the same file.

    Args:
        model: directory or hub name of a model that is not quantized.
        out: .jsonl file to write, one ``{"input_ids": [...]}`` per sequence; it is absent or complete.
        dataset: text, see ``load_documents``; all of it is tokenized.
        tokens: to write at most, prompts included; whole sequences.
        sequence_length: tokens of each sequence, those of its prompt included.
        prompt_tokens: that come from ``dataset``.
        batch_size: sequences at once.
        temperature: logits are divided by it.

    Returns:
        The number of sequences.

    Raises:
        ConfigError: numbers that do not fit one another or the model; or several processes.
        QuantizationError: ``out`` exists or cannot be written; no language model, an encoder-decoder one or
            one that is quantized; other data than text, or less than a prompt; outputs that are not finite;
            the work directory holds text of other arguments.
        Interrupted: Ctrl-C after a finished batch; says how to go on.
    """
    _check_numbers(tokens, sequence_length, prompt_tokens, batch_size, temperature, seed)
    source, out = ModelSource.of(model), Path(out).resolve()
    _check_output(out)
    _check_model(source, sequence_length)
    prompts = _prompts(source, dataset, tokens, sequence_length, prompt_tokens, seed)
    settings = {
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "temperature": float(temperature),
        "seed": seed,
    }
    work = out.with_name(f"{out.name}.work")
    with kept_unless_finished(work):
        _check_absent(out)  # once more: another run may have finished meanwhile
        writer = text_model(load_for_evaluation(source, device))
        check_vocabulary(prompts, writer.get_input_embeddings().num_embeddings)
        with working_on(f"writing text with {source.name}"):
            batches = list(_batches(writer, prompts, settings, WorkDirectory(work)))
        lines = [json.dumps({"input_ids": ids}) for batch in batches for ids in batch.tolist()]
        _check_absent(out)
        with writing(out):
            replace_file(out, "".join(f"{line}\n" for line in lines).encode())
        remove(work)
    return len(lines)


def _check_numbers(
    tokens: int, sequence_length: int, prompt_tokens: int, batch_size: int, temperature: float, seed: int
) -> None:
    owner = "writing text"
    check_number("sequence_length", sequence_length, 2, 10**7, whole=True, owner=owner)
    check_number("prompt_tokens", prompt_tokens, 1, 10**7, whole=True, owner=owner)
    check_number("tokens", tokens, 1, 10**10, whole=True, owner=owner)
    check_number("batch_size", batch_size, 1, 10**6, whole=True, owner=owner)
    check_number("temperature", temperature, 0.01, 100, owner=owner)
    check_number("seed", seed, 0, 2**32 - 1, whole=True, owner=owner)
    if prompt_tokens >= sequence_length:
        raise ConfigError(
            f"prompt_tokens={prompt_tokens} leave nothing to write in a sequence of {sequence_length}; give "
            "fewer, or a larger sequence_length"
        )
    if tokens < sequence_length:
        raise ConfigError(
            f"tokens={tokens} are fewer than one sequence of {sequence_length}; give more, or a smaller "
            "sequence_length"
        )


def _check_output(out: Path) -> None:
    """Refuse what could not be written at the end, or not be read as a dataset."""
    refuse_several("text is written")
    if out.suffix.lower() != ".jsonl":
        raise ConfigError(f"{out} needs a name that ends in .jsonl, by which datasets are known")
    _check_absent(out)
    with writing(out), tempfile.TemporaryFile(dir=next(path for path in out.parents if path.exists())):
        pass


def _check_absent(out: Path) -> None:
    if out.exists():
        raise QuantizationError(f"{out} exists; choose another name or remove it")


def _check_model(source: ModelSource, sequence_length: int) -> None:
    """Refuse, before weights are read, a model that should not or cannot write."""
    with working_on(f"config.json of {source.name}"):
        config = source.config()
    settings = stored_settings(config)
    if settings is not None and method_of(settings) not in READ:
        raise QuantizationError(
            f"{source.name} is quantized (quant_method {method_of(settings)!r}); the model that it was made "
            "from writes the better text: give that one"
        )
    if config.is_encoder_decoder:
        raise QuantizationError(
            f"{source.name} is an encoder-decoder model ({config.model_type}), which does not go on from "
            "text; give a causal language model"
        )
    check_loadable(source)
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise ConfigError(
            f"sequence_length={sequence_length} is beyond the {longest} positions of {source.name} "
            f"(max_position_embeddings); give at most {longest}"
        )


def _prompts(
    source: ModelSource, dataset: Any, tokens: int, sequence_length: int, prompt_tokens: int, seed: int
) -> Tensor:
    """Pieces from random places of the joined documents, ``[sequences, prompt_tokens]`` int64."""
    documents = load_documents(dataset, max_tokens=tokens, sequence_length=sequence_length)
    if not isinstance(documents[0], str):
        raise QuantizationError(
            "the model goes on from plain text, and the dataset holds token ids or conversations; give a "
            ".txt file, or rows with 'text'"
        )
    stream = torch.tensor(token_stream(documents, load_tokenizer(source)), dtype=torch.int64)
    if len(stream) < prompt_tokens:
        raise QuantizationError(
            f"dataset has {len(stream)} tokens, fewer than one prompt of {prompt_tokens}; give more text or "
            "fewer prompt_tokens"
        )
    generator = torch.Generator().manual_seed(seed)
    places = (len(stream) - prompt_tokens + 1, (tokens // sequence_length,))
    return stream.unfold(0, prompt_tokens, 1)[torch.randint(*places, generator=generator)]


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Sampling begins at ``seed``; afterwards torch's generators are where they were."""
    gpus = []
    if device.type == "cuda":
        gpus = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def _batches(writer: Any, prompts: Tensor, settings: dict[str, Any], work: WorkDirectory) -> Iterator[Tensor]:
    """Prompts with what follows, batch by batch, ``[batch, sequence_length]`` int64; those that the work
    directory holds are read from it."""
    identity = writing_identity(writer, prompts, settings)
    work.check_identity(work.state.setdefault("writing", identity), identity, "text")
    # What is not given is taken from the model's own: its end-of-text tokens, penalties, forced tokens.
    writer.generation_config = GenerationConfig()
    length, batches = settings["sequence_length"], prompts.split(settings["batch_size"])
    names = [f"written-{index}.safetensors" for index in range(len(batches))]
    done = sum(len(batch) for name, batch in zip(names, batches, strict=True) if work.holds(name))
    # Each batch has random numbers of its own, so that one can go on with any.
    seeds = torch.randint(2**62, (len(batches),), generator=torch.Generator().manual_seed(settings["seed"]))
    with logging.tqdm(
        total=len(prompts) * length, initial=done * length, unit=" tokens", desc="Writing text"
    ) as bar:
        for name, batch, seed in zip(names, batches, seeds.tolist(), strict=True):
            if not work.holds(name):
                work.write(name, {"input_ids": _written(writer, batch, settings, seed, bar)})
                work.commit()
            yield work.read(name)[0]["input_ids"]


def _written(writer: Any, prompts: Tensor, settings: dict[str, Any], seed: int, bar: Any) -> Tensor:
    """A batch of prompts with what follows."""
    device = writer.get_input_embeddings().weight.device
    with _seeded(seed, device):
        return writer.generate(  # type: ignore[no-any-return]
            prompts.to(device),
            attention_mask=torch.ones_like(prompts, device=device),
            generation_config=GenerationConfig(
                do_sample=True,
                temperature=settings["temperature"],
                top_k=0,
                top_p=1.0,
                max_new_tokens=settings["sequence_length"] - prompts.shape[1],
            ),
            logits_processor=LogitsProcessorList([_Finite()]),
            streamer=_Bar(bar),
        )
