"""Names of packed tensors in vLLM's stream of weights, and under which vLLM's models take them."""

from __future__ import annotations

import re

from vllm.model_executor.models.utils import WeightsMapper

from bitsmoe_plugin.errors import CheckpointError

_EXPERTS = "routed_experts"
"""vLLM's name for the module that holds the parameters, below the one that it calls experts."""


class StreamNames:
    """Leads packed tensors to the experts of this process and drops those of others.

    What stands between decoder layer and experts differs between files, transformers and vLLM
    (``block_sparse_moe``, ``mlp``), so only the number of the layer is looked at.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, set[str]] = {}

    def add(self, prefix: str) -> None:
        """Note a layer by vLLM's name for its experts.

        Raises:
            CheckpointError: the name has no number.
        """
        match = re.fullmatch(r"(?:.*\.)?(\d+)\.(\D+)", prefix)
        if match is None:
            raise CheckpointError(f"routed experts at {prefix} stand in no numbered decoder layer")
        self._numbers.setdefault(match[2], set()).add(match[1])

    def mapper(self) -> WeightsMapper:
        """Renames what belongs to a noted layer and drops other packed tensors; may be applied twice.

        Others are those of pipeline stages elsewhere, and of the target model in the loader of a draft.
        """
        rules: dict[re.Pattern[str], str | None] = {
            re.compile(rf"\b({'|'.join(sorted(numbers))})\.(?:[A-Za-z_]\w*\.)+(bitsmoe_\w+)$"): (
                rf"\1.{path}.{_EXPERTS}.\2"
            )
            for path, numbers in self._numbers.items()
        }
        rules[re.compile(rf"(?<!\.{_EXPERTS})\.bitsmoe_\w+$")] = None
        return WeightsMapper(orig_to_new_regex=rules)


def buffer_name(name: str) -> str:
    """Name of a tensor that reached the experts, without the module's."""
    return name.removeprefix(f"{_EXPERTS}.")
