"""How far tuning through the whole model has come, in a work directory; an interrupted run goes on there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitsmoe_plugin.base.interruption import Interrupted
from bitsmoe_plugin.base.work_directory import WorkDirectory
from bitsmoe_plugin.pipeline.descent import KINDS, Descent

SECONDS = 60.0
"""Between two saves: no more is lost."""
_TIMES = 20
"""So many times what the last save took passes before the next one, at least."""
_BEST = "best"


@dataclass(frozen=True)
class Best:
    """Attributes:
    epoch: after which the gains were taken; 0: nothing was better than what was there.
    before, after: KL(full precision || packed) on the held-out blocks, nats per token.
    gains: of ``Descent``.
    """

    epoch: int
    before: float
    after: float
    gains: list[Tensor]


class DescentProgress:
    """In a work directory, beside what quantization and tuning layer by layer have left there.

    What is saved is written from where it is in memory, one kind of tensors after the other; on a GPU, that
    kind is in the host's memory meanwhile.
    """

    def __init__(
        self,
        directory: WorkDirectory,
        identity: dict[str, Any],
        through: str,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            identity: JSON-ready: everything that the result depends on.
            through: "model", or "both" after tuning layer by layer; see ``check_way``.
            stop: asked before each step whether to stop there.

        Raises:
            QuantizationError: the directory holds progress of another identity.
        """
        fresh = {"identity": identity, "through": through, "saves": 0, "steps": 0, "best": None}
        self._state = directory.state.setdefault("descent", fresh)
        directory.check_identity(self._state["identity"], identity, "tuning")
        self._directory, self._stop = directory, stop
        self._last, self._took = time.monotonic(), 0.0

    def take_up(self, descent: Descent) -> Best | None:
        """Have a new descent go on where the last save was; None if there is none."""
        if self._state["best"] is None:
            return None
        descent.go_on(self._state["steps"], {kind: self._read(kind, self._state["saves"]) for kind in KINDS})
        found = self._read(_BEST, self._state["best"]["epoch"])
        return Best(**self._state["best"], gains=[found[str(i)] for i in range(len(found))])

    def before_step(self, descent: Descent, best: Best) -> None:
        """Save if it is time, or if this is to stop here.

        Raises:
            Interrupted: it is.
        """
        if self._stop():
            self.save(descent, best)
            raise Interrupted(
                f"tuning stopped after {descent.taken} of {descent.steps} steps through the whole model; "
                f"{self._directory.path} holds what is finished. Start the same again to go on"
            )
        if time.monotonic() - self._last >= max(SECONDS, _TIMES * self._took):
            self.save(descent, best)

    def save(self, descent: Descent, best: Best) -> None:
        """Make this what the next run goes on from.

        Raises:
            QuantizationError: it cannot be written; what was saved before counts.
        """
        start, state = time.monotonic(), self._state
        saves, last = state["saves"] + 1, state["best"]
        for kind, tensors in descent.state().items():
            self._write(kind, saves, tensors)
            self._directory.forget(_file(kind, saves - 1))
        if last is None or last["epoch"] != best.epoch:
            self._write(_BEST, best.epoch, {str(i): gain for i, gain in enumerate(best.gains)})
            if last is not None:
                self._directory.forget(_file(_BEST, last["epoch"]))
        best_values = {"epoch": best.epoch, "before": best.before, "after": best.after}
        state.update(saves=saves, steps=descent.taken, best=best_values)
        self._directory.commit()
        self._last = time.monotonic()
        self._took = self._last - start

    def _write(self, kind: str, number: int, tensors: dict[str, Tensor]) -> None:
        if tensors:
            self._directory.write(_file(kind, number), tensors)

    def _read(self, kind: str, number: int) -> dict[str, Tensor]:
        name = _file(kind, number)
        if not self._directory.holds(name):
            return {}
        return {key: tensor.clone() for key, tensor in self._directory.read(name)[0].items()}


def _file(kind: str, number: int) -> str:
    return f"{kind}-{number}.safetensors"


def begun(directory: WorkDirectory) -> str | None:
    """The way, see ``TuningSettings.through``, that a directory holds steps through the whole model of."""
    way: str | None = directory.state.get("descent", {}).get("through")
    return way


def check_way(directory: WorkDirectory, through: str) -> None:
    """Refuse to go on in one way with what another has left.

    Args:
        through: see ``TuningSettings``, not "auto" any more.

    Raises:
        QuantizationError: steps through the whole model would be lost, or layers that were tuned.
    """
    left = begun(directory)
    if left is None and "tuning" in directory.state and through == "model":
        left = "layers"
    if left is not None:
        directory.check_identity({"through": left}, {"through": through}, "tuning")
