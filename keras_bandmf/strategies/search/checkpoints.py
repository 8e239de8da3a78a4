"""Checkpoints of a banded search: all that the next iterations depend on, to the last bit."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from keras_bandmf.strategies.search.cache import Record, Store
from keras_bandmf.strategies.search.lbfgs import DescentState

_KIND = "checkpoint"


class SearchState(NamedTuple):
    """Where a search is.

    Attributes:
      stage: index of the power mean being minimised.
      before: iterations of the stages before it.
      origin: `(n, b)` float64, the columns this stage began with.
      best: `(n, b)` float64, the best columns of the stages before it.
      descent: the state of this stage's descent; None at its beginning.
    """

    stage: int
    before: int
    origin: np.ndarray
    best: np.ndarray
    descent: DescentState | None


class Checkpoints:
    """Keeps the state of one search in a store.

    Args:
      store: the files of this request.
      seconds: least time between two checkpoints.
    """

    def __init__(self, store: Store, seconds: float):
        self._store, self._seconds = store, seconds
        self._last = time.monotonic()
        self._found = store.load(_KIND)

    @property
    def start(self) -> np.ndarray | None:
        """`(n, b)` float64, where the search that is kept began; None if there is none."""
        return None if self._found is None else self._found.arrays["start"]

    def load(self, start: np.ndarray) -> SearchState | None:
        """Returns the state that is kept, of a search from `start`; None if there is none."""
        self._start = start
        if self._found is None:
            return None
        fields, arrays = self._found
        self._found = None
        pairs = [(arrays[f"moved{i}"], arrays[f"turned{i}"]) for i in range(fields["pairs"])]
        descent = DescentState(
            arrays["point"], arrays["gradient"], fields["values"], fields["evaluations"], pairs
        )
        origin, best = arrays.get("origin", start), arrays.get("best", start)
        return SearchState(fields["stage"], fields["before"], origin, best, descent)

    def save_at_times(self, state: SearchState) -> None:
        """Saves the state if the last checkpoint is long enough ago."""
        if time.monotonic() - self._last >= self._seconds:
            self.save(state)

    def save(self, state: SearchState) -> None:
        """Saves the state, whose `descent` is there."""
        descent = state.descent
        fields = {
            "stage": state.stage,
            "before": state.before,
            "values": descent.values,
            "evaluations": descent.evaluations,
            "pairs": len(descent.pairs),
        }
        arrays = {"start": self._start, "point": descent.point, "gradient": descent.gradient}
        for i, (moved, turned) in enumerate(descent.pairs):
            arrays |= {f"moved{i}": moved, f"turned{i}": turned}
        # Mostly both are the start itself, which need not be written three times.
        for name, columns in (("origin", state.origin), ("best", state.best)):
            if columns is not self._start:
                arrays[name] = columns
        self._store.save(_KIND, Record(fields, arrays))
        self._last = time.monotonic()

    def remove(self) -> None:
        """Removes what is kept: the search has ended."""
        self._store.remove(_KIND)
