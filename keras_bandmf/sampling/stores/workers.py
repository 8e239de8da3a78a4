"""Threads that read rows for one iterator, and a warning where they are too slow."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from keras_bandmf.sampling.stores.base import Store

_Part = TypeVar("_Part")

#: The first words of the names of the threads.
THREAD_NAME = "keras_bandmf_rows"

_MOST_THREADS = 8
_WINDOW_SECONDS = 10.0
_WINDOW_BATCHES = 5
_SLOW_SHARE = 0.9


def default_workers() -> int:
    """Returns the number of threads where the user names none: the processors, at most 8."""
    return min(_MOST_THREADS, os.cpu_count() or 1)


class Turns:
    """A lock that a copied or pickled object takes along as a new one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *args: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()


class Stopped(RuntimeError):
    """Ends a part of the work whose result nobody waits for any more."""


class Workers:
    """Threads of one iterator. With a count of 1 there are none: the caller does the work.

    Args:
        count: How many.
    """

    def __init__(self, count: int):
        self.count = count
        self._closed = threading.Event()
        self._pool = (
            concurrent.futures.ThreadPoolExecutor(count, thread_name_prefix=THREAD_NAME)
            if count > 1
            else None
        )

    def each(
        self,
        function: Callable[[_Part, Callable[[], None]], object],
        parts: Sequence[_Part],
    ) -> None:
        """Calls a function on all parts, and returns or raises when no call is running.

        Args:
            function: What to do with a part. Its second argument is a function that it calls
                before each row: it raises where another part has failed, or the workers are closed.
            parts: Its arguments, one for each call.

        Raises:
            RuntimeError: The workers are closed.
            Exception: What the first part that failed raised; the others end after their rows.
        """
        stop = threading.Event()

        def go_on() -> None:
            if self._closed.is_set():
                raise Stopped(
                    "These rows are no longer read, because the `fit` that read them has ended."
                )
            if stop.is_set():
                raise Stopped("Other rows of the batch could not be read.")

        def run(part: _Part) -> None:
            try:
                function(part, go_on)
            except BaseException:
                stop.set()
                raise

        go_on()
        if self._pool is None or len(parts) < 2:
            for part in parts:
                function(part, go_on)
            return
        futures: list[concurrent.futures.Future[None]] = []
        failures: list[Exception] = []
        stopped: Exception | None = None
        try:
            for part in parts:
                futures.append(self._submitted(run, part, go_on))
            for future in futures:
                try:
                    future.result()
                except (Stopped, concurrent.futures.CancelledError) as error:
                    stopped = error  # another part has failed, or the workers are closed
                except Exception as error:
                    failures.append(error)
        finally:
            stop.set()
            # `wait` would wait for ever for a future that `close` has cancelled.
            concurrent.futures.wait([future for future in futures if not future.cancel()])
        if failures:
            raise failures[0]
        if self._closed.is_set():
            go_on()
        if stopped is not None:
            raise stopped

    def _submitted(
        self, run: Callable[[_Part], None], part: _Part, go_on: Callable[[], None]
    ) -> concurrent.futures.Future[None]:
        try:
            return self._pool.submit(run, part)  # type: ignore[union-attr]
        except RuntimeError:
            go_on()  # says that the workers were closed just now
            raise

    def split(self, places: np.ndarray) -> list[np.ndarray]:
        """Returns parts of the places of a batch, two for each worker.

        Args:
            places: (k,) anything.

        Returns:
            At most k arrays that are not empty.
        """
        if not len(places):
            return []
        return np.array_split(places, min(len(places), 2 * self.count))

    def close(self) -> None:
        """Ends the threads, after the rows that they are reading."""
        self._closed.set()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


class OpenReaders:
    """The workers of a store that are open now."""

    def __init__(self) -> None:
        self._open: weakref.WeakSet[Workers] = weakref.WeakSet()
        self._turns = Turns()

    def __reduce__(self) -> tuple[type[OpenReaders], tuple[()]]:
        return OpenReaders, ()

    @contextlib.contextmanager
    def workers(self, count: int) -> Iterator[Workers]:
        """Yields new workers, which end with the context."""
        workers = Workers(count)
        with self._turns:
            self._open.add(workers)
        try:
            yield workers
        finally:
            workers.close()
            with self._turns:
                self._open.discard(workers)

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Closes at its end the workers that were opened within."""
        before = self._listed()
        try:
            yield
        finally:
            for workers in self._listed():
                if not any(workers is other for other in before):
                    workers.close()

    def _listed(self) -> list[Workers]:
        with self._turns:
            return list(self._open)


class Pace:
    """Notices that training waits for rows, and warns once.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._warned = False
        self._ended: float | None = None
        self._start_window()

    def _start_window(self) -> None:
        self._reading = self._other = 0.0
        self._batches = self._rows = 0

    def timed(self, read: Callable[[], Any], rows: int, workers: int) -> Any:
        """Reads a batch, and warns if reading took nearly all the time of late.

        An iterator that is ahead of training waits between two batches until there is room for
        more. If it does not wait, training does.

        Args:
            read: Reads the batch.
            rows: Its number of rows.
            workers: How many threads read.

        Returns:
            What `read` returned.
        """
        began = self._clock()
        if self._ended is not None:
            self._other += began - self._ended
        result = read()
        self._ended = self._clock()
        self._reading += self._ended - began
        self._batches += 1
        self._rows += rows
        whole = self._reading + self._other
        if whole >= _WINDOW_SECONDS and self._batches >= _WINDOW_BATCHES:
            if self._reading > _SLOW_SHARE * whole and not self._warned:
                self._warned = True
                self._warn(workers)
            self._start_window()
        return result

    def _warn(self, workers: int) -> None:
        whole = self._reading + self._other
        warnings.warn(
            f"Training waits for its rows: {100 * self._reading / whole:.0f} % of the last "
            f"{whole:.0f} seconds went into reading them, "
            f"{1000 * self._reading / self._batches:.0f} ms a batch or "
            f"{self._rows / self._reading:.0f} rows a second, by {workers} "
            f"{'thread' if workers == 1 else 'threads'}. Use more `workers=` if the source may be "
            "read by several threads. For the next run, write it once to a faster file with "
            "`keras_bandmf.sources.convert`; a run that has begun goes on with what it began with.",
            stacklevel=2,
        )


class Reader(Store):
    """A store, read by the workers of one iterator.

    Args:
        store: The store.
        read: Reads rows by their numbers with the workers.
        workers: The workers.
    """

    def __init__(
        self,
        store: Store,
        read: Callable[[np.ndarray, Workers], dict[str, Any]],
        workers: Workers,
    ):
        self._store, self._read, self._workers = store, read, workers
        self._pace = Pace()

    @property
    def num_examples(self) -> int:
        """The number of rows."""
        return self._store.num_examples

    def rows(self, indices: np.ndarray) -> dict[str, Any]:
        """Returns copies of rows; see `Store.rows`."""
        return self._pace.timed(
            lambda: self._read(indices, self._workers), len(indices), self._workers.count
        )

    def spec(self) -> dict[str, Any]:
        """Returns the specs of the store."""
        return self._store.spec()

    def digest(self, key: bytes) -> bytes:
        """Returns the digest of the store."""
        return self._store.digest(key)
