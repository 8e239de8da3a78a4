"""Sources whose rows share memory or stand in another order: refused, or copied in their turn."""

import time

import numpy as np
import pytest

from keras_bandmf import PrivacyError
from keras_bandmf.sampling.stores import choice
from tests.sampling.stores.test_rows import N, Source, Together, opened


class Buffered(Source):
    """Writes each row into one of its `buffers`, in turns."""

    def __init__(self, buffers, form=lambda buffer: buffer, size=3):
        super().__init__(None)
        self.buffers = [np.zeros(size) for _ in range(buffers)]
        self.form = form

    def __getitem__(self, number):
        self.read.append(number)
        buffer = self.buffers[len(self.read) % len(self.buffers)]
        buffer[:] = number
        return self.form(buffer)


BUFFER_FORMS = {
    "array": lambda buffer: buffer,
    "view": lambda buffer: buffer[::-1],
    "nested": lambda buffer: ({"a": [buffer]}, 1.0),
    "memoryview": lambda buffer: {"raw": memoryview(buffer)},
    "tensor": lambda buffer: TensorOf(buffer),
}


class TensorOf:
    """A tensor of an unknown library: a view of an array."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array if dtype is None else self.array.astype(dtype)


def first_number(element):
    """The row number in an element of `Buffered`."""
    while not isinstance(element, (np.ndarray, memoryview, TensorOf)):
        element = next(iter(element.values())) if isinstance(element, dict) else element[0]
    return np.float32(np.asarray(element).flat[0])


@pytest.mark.parametrize("form", BUFFER_FORMS)
@pytest.mark.parametrize("options", [{}, {"workers": 4}, {"workers": 1}], ids=str)
@pytest.mark.parametrize("buffers", [1, 2])
def test_a_source_that_returns_its_own_buffer_is_refused(form, options, buffers):
    with pytest.raises(PrivacyError, match="Return a copy"):
        opened(Buffered(buffers, BUFFER_FORMS[form]), decode=first_number, **options)
    if form in ("array", "view"):
        with pytest.raises(PrivacyError, match="Return a copy"):
            opened(Buffered(buffers, BUFFER_FORMS[form]), **options)


def test_equal_rows_that_share_memory_are_refused():
    label = np.zeros(1, int)
    with pytest.raises(PrivacyError, match="share memory"):
        opened(lambda i: (float(i), label))
    shared = {"a": 1.0}
    with pytest.raises(PrivacyError, match="share memory"):
        opened(lambda i: shared)
    rows = opened(lambda i: np.frombuffer(b"abc", np.uint8)).rows(np.array([3]))
    assert rows["x"].tobytes() == b"abc"  # nobody can change bytes


def test_a_random_source_with_one_buffer_is_refused():
    rng, buffer = np.random.default_rng(0), np.zeros(4)

    def row(i):
        buffer[:] = rng.normal(size=4)
        return buffer

    with pytest.raises(PrivacyError):
        opened(row)


def test_a_row_that_depends_on_the_row_before_is_refused():
    before = [None]

    def row(i):
        last, before[0] = before[0], i
        return float(i), -1 if last is None else last

    with pytest.raises(ValueError, match="depend on what was read before"):
        opened(row)


class BufferedTogether(Buffered):
    def __getitems__(self, numbers):
        return [self[number] for number in numbers]


@pytest.mark.parametrize("form", BUFFER_FORMS)
@pytest.mark.parametrize(("kind", "buffers"), [(Buffered, 1), (BufferedTogether, 2)])
def test_elements_are_copied_before_the_source_is_called_again(form, kind, buffers, monkeypatch):
    """A source with more buffers than are read when batches are made, and fewer later."""
    monkeypatch.setattr(choice, "default_workers", lambda: 4)
    source, wait = kind(20, BUFFER_FORMS[form]), [0.0]

    def decode(element):
        time.sleep(wait[0])
        return first_number(element)

    store = opened(source, decode=decode)
    source.buffers, wait[0] = source.buffers[:buffers], 0.01
    numbers = np.arange(16)
    assert store.rows(numbers)["x"].tolist() == numbers.tolist()


@pytest.mark.parametrize("kind", [Buffered, BufferedTogether])
def test_rows_are_copied_before_the_source_is_called_again(kind, monkeypatch):
    monkeypatch.setattr(choice, "default_workers", lambda: 4)
    source = kind(20, size=30_000)
    store = opened(source)
    source.buffers = source.buffers[: 1 if kind is Buffered else 4]
    numbers = np.arange(32)
    for _ in range(10):
        assert (store.rows(numbers)["x"] == numbers[:, None]).all()


@pytest.mark.parametrize("workers", [None, 3])
def test_a_decode_that_returns_one_buffer_is_refused(workers):
    buffer = np.zeros(3)

    def decode(element):
        buffer[:] = element
        return buffer

    with pytest.raises(PrivacyError, match="`decode`, to return new values.*Return a copy"):
        opened(float, decode=decode, workers=workers)


GETITEMS = {
    "reversed": lambda source, numbers: [source[i] for i in numbers[::-1]],
    "sorted": lambda source, numbers: [source[i] for i in sorted(numbers)],
    "buffer": lambda source, numbers: [source.into(source.buffer, i) for i in numbers],
    "buffers": lambda source, numbers: [
        source.into(buffer, i) for buffer, i in zip(source.buffers, numbers, strict=False)
    ],
    "other bits": lambda source, numbers: [source[i] + np.float32(1e-6) for i in numbers],
}


@pytest.mark.parametrize("kind", GETITEMS)
@pytest.mark.parametrize("workers", [None, 2])
def test_a_getitems_that_is_not_getitem_is_refused(kind, workers):
    class Several(Source):
        buffer, buffers = np.zeros(3, "float32"), np.zeros((N, 3), "float32")

        def into(self, buffer, number):
            buffer[:] = number
            return buffer

        def __getitems__(self, numbers):
            return GETITEMS[kind](self, numbers)

    with pytest.raises(PrivacyError, match="__getitems__"):
        opened(Several(lambda i: np.full(3, i, "float32")), workers=workers)


def test_getitems_gets_sorted_numbers_without_repetition():
    source = Together(float)
    store = opened(source, workers=1)
    source.read.clear()
    rows = store.rows(np.array([9, 4, 9, 9, 30, 4]))["x"]
    assert rows.tolist() == [9, 4, 9, 9, 30, 4]
    assert source.read == [4, 9, 30]


def test_a_getitems_that_fails_is_not_passed_over():
    class Several(Together):
        broken = True

        def __getitems__(self, numbers):
            if self.broken:
                raise OSError("no connection")
            return super().__getitems__(numbers)

    source = Several(float)
    with pytest.raises(RuntimeError, match="__getitems__.*OSError: no connection"):
        opened(source)
    source.broken = False
    store = opened(source)
    source.broken = True
    with pytest.raises(RuntimeError, match="__getitems__.*OSError: no connection"):
        store.rows(np.arange(20))


def test_an_object_that_changes_with_the_next_row_is_refused():
    class Image(TensorOf):
        """As an image of PIL, whose memory NumPy does not see."""

        def __array__(self, dtype=None, copy=None):
            return np.array(self.array, dtype)

    with pytest.raises(PrivacyError, match="changed by reading"):
        opened(Buffered(1, Image))
