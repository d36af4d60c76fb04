"""A program for torchrun: quantize as one of several processes, in groups of few experts."""

from __future__ import annotations

import sys
from pathlib import Path

import resume_support
import torch

from bitsmoe_plugin import problem
from bitsmoe_plugin.integrations.transformers import quantize_to_directory
from bitsmoe_plugin.workers import connected

if __name__ == "__main__":
    model, out, groups_of = sys.argv[1:]
    torch.set_num_threads(1)
    problem.WORKING_SET = int(groups_of) * 32**2  # hidden_size of the tests' models
    with connected() as workers:
        # Another text for one of the processes, if its rank is named.
        options = {"seed": workers.rank} if "differ" in Path(out).name else {}
        quantize_to_directory(model, Path(out), resume_support.config(**options))
