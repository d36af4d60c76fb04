"""Every option is checked, and the config survives config.json."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
from typing import Any

import pytest

from bitsmoe_plugin import BitsMoEConfig, CheckpointError, ConfigError
from bitsmoe_plugin.cli import build_parser, parse_options
from bitsmoe_plugin.codec.layout import FORMAT_VERSION
from bitsmoe_plugin.options import OPTIONS
from bitsmoe_plugin.presets import ALL_WIDTHS, METHODS

# option -> (values that must be refused, what the error must say is allowed)
INVALID: dict[str, tuple[list[Any], str]] = {
    "factor_bits": ([0, 0.09, 16.5, math.nan, "2", True], "a number from 0.1 to 16"),
    "bits": ([0, -1, 0.09, 16.5, math.nan, math.inf, "2", None, True], "a number from 0.1 to 16"),
    "layer_bits": ([2.0, [3], {"a": 0}, {"a": "2"}, {"a": True}, {1: 2.0}, {"a": math.nan}], "bits from 0.1"),
    "projection_bits": ([2.0, {"gate_up": 2}, {"down": 17}, {"up": None}], '"gate", "up" or "down"'),
    "calibration_tokens": ([0, -5, 1e5, "9", True], "a whole number from 1 to"),
    "sequence_length": ([0, 7, 512.0, None], "a whole number from 8 to"),
    "batch_size": ([0, 2.5, "8", True], "a whole number from 1 to"),
    "widths": (
        [
            (),
            (2, 2),
            (4, 2),
            (5,),
            (2, 7),
            (-1,),
            (32,),
            "24",
            2,
            (True, 2),
            ("2",),
            (None,),
            (2.0, 4.0),
        ],
        str(ALL_WIDTHS),
    ),
    "basis_bits": ([2, 0, 32, "4", True, 4.0], "4, 8, 16"),
    "basis_group_size": ([0, 8, 48, 512, "32", None, 32.0], "16, 32, 64, 128, 256"),
    "whitening": ([1, 0, "yes"], "True, False"),
    "feedback": ([1, 0, "yes"], "True, False"),
    "refit": ([1, 0, "yes"], "True, False"),
    "sequential": ([1, 0, "yes"], "True, False"),
    "joint_basis": ([1, 0, "yes"], "True, False"),
    "neuron_weighting": ([1, 0, "yes"], "True, False"),
    "compensation": ([1, 0, "yes"], "True, False"),
    "widening": ([1, 0, "yes"], "True, False"),
    "held_out": ([-0.1, 0.6, math.nan, "1", None, True], "a number from 0 to 0.5"),
    "method": (["paper", "", None, 1], "'default', 'fast', 'paper-v1', 'paper-v2'"),
    "cost": (["Output", "energy", "", True], "'output', 'model', 'spectral'"),
    "grid": (["Trellis", "", True], "'trellis', 'uniform'"),
    "token_weighting": (["Residual", "all", "", True], "'residual', 'none'"),
    "scope": (["Global", "model", "", 1], "'global', 'layer'"),
    "covariance_prior": ([-0.1, math.nan, math.inf, "1", True], "a number from 0 to"),
    "damping": ([0, -1, 1.5, math.nan, "0.01", None], "a number from 1e-06 to 1"),
    "super_experts": (["none", None, True, ["a"], {"a": 1}, {"a": [-1]}, {"a": [True]}], '"keep", {} or'),
    "all_experts": ([1, 0, "yes"], "True, False"),
    "allow_thin": ([1, 0, "yes"], "True, False"),
    "allow_slow": ([1, 0, "yes"], "True, False"),
    "tune": ([-1, 1.5, "2", True, None], "a whole number from 0 to 1000"),
    "tune_through": (["layer", "", None, 1], "'auto', 'layers', 'model', 'both'"),
    "seed": ([-1, 0.5, 2**63, "0", None, True], "a whole number from 0 to"),
    "dense_bits": ([0, 2, 8.0, "x", True, None, {}, {"q_proj": 3}, {3: 8}], '16, 8, 4 or {"pattern"'),
    "dense_group_size": ([0, 64, "32", True], "128, 32"),
    "size": ([0, -1, "11XB", "GB", 1.5, True, ""], "a size like 11GB"),
    "fit": ([0, "24 G", True, [1]], "a size like 24GB"),
    "fit_context": ([0, 1.5, "8192", None], "a whole number from 1 to"),
    "fit_batch": ([0, "1", None], "a whole number from 1 to"),
    "dense": ([["a"], "a", 3], "objects written by this package"),
    "format_version": ([0, -1, 1, "2", None, 2.0, True], "a whole number from 2 to 2"),
    "layers": ([["a"], "a", 3], "objects"),
    "calibration": ([["a"], "a", 3], "objects"),
    "other_tensors": ([["a"], "a", 3], "objects"),
    "other_tensors_in_model": ([["a"], "a", 3], "objects"),
}


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [(option, value, allowed) for option, (values, allowed) in INVALID.items() for value in values],
)
def test_bad_value_is_refused_with_option_value_and_what_is_allowed(
    option: str, value: Any, allowed: str
) -> None:
    """The user must be able to correct the call from the message alone."""
    with pytest.raises(ConfigError) as error:
        BitsMoEConfig(**{option: value})
    message = str(error.value)
    assert option in message
    assert allowed in message
    shown = tuple(value) if option == "widths" and isinstance(value, (list, tuple)) else value
    manifest = option in (  # too long to print: the type has to do
        "layers",
        "dense",
        "calibration",
        "other_tensors",
        "other_tensors_in_model",
    )
    assert (type(value).__name__ if manifest else f"{option}={shown!r}") in message


def test_every_option_is_covered_above() -> None:
    """Guards against an option that is added without validation."""
    budgets = {"layer_bits": {"a": 2}, "projection_bits": {"up": 2}, "other_tensors_in_model": {"a": "b"}}
    dense = {"dense_bits": 8, "dense_group_size": 32, "dense": {"a": "b"}}
    dense |= {"size": "2GB", "fit": "3GB", "fit_context": 9, "fit_batch": 2}
    # Those are not stored if empty, or as they are by default.
    stored = set(BitsMoEConfig(**budgets, **dense).to_dict()) - {"quant_method"}
    assert stored == set(INVALID) - {"allow_slow", "allow_thin", "tune", "tune_through"}


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 0.1},
        {"bits": 16},
        {"bits": 3},
        {"widths": ALL_WIDTHS},
        {"widths": [0, 2]},
        {"widths": (16,)},
        {"basis_bits": 16, "basis_group_size": 256},
        {"covariance_prior": 0, "damping": 1.0, "seed": 2**63 - 1},
        {"sequence_length": 8, "batch_size": 1, "calibration_tokens": 1},
    ],
)
def test_values_at_the_ends_of_the_ranges_are_accepted(options: dict[str, Any]) -> None:
    """Guards against off-by-one limits."""
    config = BitsMoEConfig(**options)
    assert all(getattr(config, name) == (tuple(v) if name == "widths" else v) for name, v in options.items())


def test_round_trip_through_json() -> None:
    """Every option at a value other than its default comes back; calibration text does not leave."""
    changed = {
        "bits": 2.5,
        "factor_bits": 2.25,
        "calibration_tokens": 1000,
        "sequence_length": 64,
        "batch_size": 3,
        "widths": [1, 2, 16],
        "basis_bits": 16,
        "basis_group_size": 64,
        "held_out": 0.25,
        "method": "paper-v2",
        "grid": "uniform",
        "joint_basis": False,
        "cost": "spectral",
        "neuron_weighting": False,
        "widening": False,
        "compensation": False,
        "whitening": False,
        "token_weighting": "none",
        "feedback": False,
        "refit": False,
        "sequential": False,
        "scope": "layer",
        "covariance_prior": 0.5,
        "damping": 0.125,
        "seed": 7,
        "layers": {"model.layers.0.mlp.experts": {"num_experts": 4, "report": {"tokens_per_expert": [1, 2]}}},
        "calibration": {"tokens": 12, "sha256": "ab"},
        "other_tensors": {"lm_head.weight": "ab"},
    }
    config = BitsMoEConfig(**changed, dataset=["secret text"], tokenizer="secret/tokenizer")
    text = json.dumps(config.to_dict())
    assert "secret" not in text
    default = BitsMoEConfig().to_dict()
    stored = json.loads(text)
    assert all(stored[name] == value != default[name] for name, value in changed.items())
    assert stored["quant_method"] == "bitsmoe"
    assert stored["format_version"] == FORMAT_VERSION
    back = BitsMoEConfig.from_dict(stored)
    assert back.to_dict() == config.to_dict()
    assert back.widths == (1, 2, 16)
    assert back.dataset is None


@pytest.mark.parametrize("method", list(METHODS))
def test_a_method_sets_its_options_and_given_ones_replace_them(method: str) -> None:
    """Guards against a switch that a preset overrides, or that a stored config forgets."""
    config = BitsMoEConfig(method=method)
    assert {name: getattr(config, name) for name in METHODS[method]} == METHODS[method]
    for flag in ("joint_basis", "whitening", "feedback", "refit", "widening"):
        switched = BitsMoEConfig(method=method, **{flag: not METHODS[method][flag]})
        back = BitsMoEConfig.from_dict(json.loads(json.dumps(switched.to_dict())))
        changed = {name for name in METHODS[method] if getattr(back, name) != METHODS[method][name]}
        assert changed == {flag}


def test_unknown_option_is_refused_with_the_known_ones() -> None:
    """Guards against a misspelt option that silently does nothing."""
    with pytest.raises(ConfigError, match=r"unknown option width; known: .*widths") as error:
        BitsMoEConfig(width=(2,))
    known = str(error.value).split("known: ")[1].split(", ")
    runtime_only = {"dataset", "tokenizer", "chat_template_kwargs", "work_dir"}
    assert set(INVALID) | runtime_only == set(known)


@pytest.mark.parametrize("value", ["", 3, True])
def test_work_directory_that_is_no_path_is_refused(value: Any) -> None:
    """Guards against a run that seems to be saved; it is not stored, so it is not among the options above."""
    with pytest.raises(ConfigError, match=r"work_dir=.* the path of a directory"):
        BitsMoEConfig(work_dir=value)
    assert "work_dir" not in BitsMoEConfig(work_dir="somewhere").to_dict()


def test_older_format_version_asks_to_quantize_again() -> None:
    """Version 1 had no trellis: its rows would decode to something else without a word."""
    stored = {**BitsMoEConfig().to_dict(), "format_version": 1, "layers": {"model.layers.0.mlp.experts": {}}}
    with pytest.raises(CheckpointError, match=r"version 1.*Quantize the model again"):
        BitsMoEConfig.from_dict(stored)


def test_newer_format_version_asks_for_an_upgrade() -> None:
    """Guards against reading a later layout as this one; options it may add must not hide that."""
    stored = {**BitsMoEConfig().to_dict(), "format_version": FORMAT_VERSION + 1, "option_of_the_future": 1}
    with pytest.raises(
        CheckpointError, match=rf"version {FORMAT_VERSION + 1}.*reads version {FORMAT_VERSION}.*Upgrade"
    ):
        BitsMoEConfig.from_dict(stored)


def test_the_constructor_is_the_table() -> None:
    """Guards against an option that can be seen and not given, or given in another order than is shown."""
    shown = inspect.signature(BitsMoEConfig).parameters
    assert [*shown] == [*OPTIONS, "unknown"]
    assert {name: shown[name].default for name in OPTIONS} == {n: row.default for n, row in OPTIONS.items()}
    config = BitsMoEConfig(3.0, 2.5, ["text"])
    assert (config.bits, config.factor_bits, config.dataset) == (3.0, 2.5, ["text"])
    with pytest.raises(TypeError, match="bits"):
        BitsMoEConfig(3.0, bits=2.0)  # type: ignore[misc]


def test_each_option_is_explained_with_what_is_allowed() -> None:
    """`python -m pydoc` is what the command line refers to."""
    text = " ".join(str(BitsMoEConfig.__doc__).split())
    for name, row in OPTIONS.items():
        assert f" {name}: {row.help}." in text
    assert "Allowed: a number from 0 to 0.5. Default: 0.0625." in text
    assert "Default: 4. By method: paper-v1 16, paper-v2 8." in text


def test_flags_are_those_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Or help would tell a default that is not the library's; what has no flag is found under --option."""
    with pytest.raises(SystemExit):
        build_parser().parse_args(["quantize", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    args = build_parser().parse_args(["quantize", "model", "out", "--dataset", "file"])
    for name, row in OPTIONS.items():
        if row.flag:
            assert f"--{name.replace('_', '-')} {row.flag} {row.help}" in text
            assert getattr(args, name) == ("file" if name == "dataset" else row.default)
        else:
            assert (f" {name}," in text or f" {name};" in text) != row.manifest
            assert parse_options([f"{name}=1"]) == {name: 1}


def test_pickled_and_given_options_are_the_users_no_more() -> None:
    """Workers get configs pickled; what is given may be changed afterwards, and so may what is stored."""
    manifest: dict[str, Any] = {"a": {"widths": {"up": [1]}}}
    template = {"documents": [1]}
    config = BitsMoEConfig(layers=manifest, chat_template_kwargs=template, work_dir="somewhere")
    manifest["a"]["widths"]["up"].append(2)
    template["documents"].append(2)
    for other in (pickle.loads(pickle.dumps(config)), copy.copy(config), copy.deepcopy(config)):
        assert vars(other) == vars(config)
        other.layers["a"]["widths"]["up"].append(3)
        other.chat_template_kwargs["documents"].append(3)
    assert config.layers == {"a": {"widths": {"up": [1]}}}
    assert config.chat_template_kwargs == {"documents": [1]}
