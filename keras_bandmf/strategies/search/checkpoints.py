"""Checkpoints of a banded search: everything that its next iterations depend on, bit for bit."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from keras_bandmf.strategies.search.cache import Kind, Record, Store
from keras_bandmf.strategies.search.lbfgs import DescentState

_KIND: Kind = "checkpoint"


class SearchState(NamedTuple):
    """How far a search has come.

    Attributes:
      stage: the index of the power mean that is being minimized.
      before: the number of iterations of the stages before it.
      origin: `(n, b)` float64, the columns with which this stage began.
      best: `(n, b)` float64, the best columns of the stages before it.
      descent: the state of this stage's descent. None at its beginning.
    """

    stage: int
    before: int
    origin: np.ndarray
    best: np.ndarray
    descent: DescentState | None


class Checkpoints:
    """Keeps the state of one search in a file.

    Args:
      store: the files of this request.
      seconds: the least time between two checkpoints.
    """

    def __init__(self, store: Store, seconds: float):
        self._store, self._seconds = store, seconds
        self._last = time.monotonic()
        self._found = store.load(_KIND)

    @property
    def start(self) -> np.ndarray | None:
        """The `(n, b)` float64 columns at which the stored search began, or None."""
        return None if self._found is None else self._found.arrays["start"]

    def load(self, start: np.ndarray) -> SearchState | None:
        """Returns the stored state of a search from `start`, or None if there is none.

        Args:
          start: `(n, b)` float64.

        Returns:
          The state, once: a second call returns None.
        """
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
        """Saves the state of a search within a stage if the last checkpoint is long enough ago."""
        if time.monotonic() - self._last >= self._seconds:
            self.save(state)

    def save(self, state: SearchState) -> None:
        """Saves the state of a search within a stage.

        Args:
          state: how far the search has come.

        Raises:
          ValueError: if `state.descent` is None: there is nothing to continue from.
        """
        descent = state.descent
        if descent is None:
            raise ValueError(
                "Expected `state.descent` to be the state of a descent. Received: "
                "state.descent=None. Save a search after its first iteration."
            )
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
        # In most cases both are the start itself, which need not be written three times.
        for name, columns in (("origin", state.origin), ("best", state.best)):
            if columns is not self._start:
                arrays[name] = columns
        self._store.save(_KIND, Record(fields, arrays))
        self._last = time.monotonic()

    def remove(self) -> None:
        """Removes the file. Called when the search has ended."""
        self._store.remove(_KIND)
