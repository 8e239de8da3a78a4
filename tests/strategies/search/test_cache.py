"""Files of a request: whole or not used, never confused, never half written."""

import os

import numpy as np
import pytest

from keras_bandmf.strategies.search.cache import Record, Store, digest

RECORD = Record(
    {"values": [0.1, 1e-300], "n": 3}, {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(4)}
)


def test_a_record_comes_back_to_the_last_bit(tmp_path):
    store = Store(tmp_path / "new" / "directory", {"n": 1})
    assert store.load("result") is None
    store.save("result", RECORD)
    back = Store(tmp_path / "new" / "directory", {"n": 1}).load("result")
    assert back.fields == RECORD.fields and list(back.arrays) == ["a", "b"]
    for name, array in RECORD.arrays.items():
        np.testing.assert_array_equal(back.arrays[name], array)
    assert [p.name for p in store.path("result").parent.iterdir()] == [store.path("result").name]


def test_requests_and_kinds_have_files_of_their_own(tmp_path):
    one, other = Store(tmp_path, {"n": 1}), Store(tmp_path, {"n": 2})
    one.save("result", RECORD)
    assert other.load("result") is None and one.load("checkpoint") is None
    one.remove("result")
    one.remove("result")
    assert one.load("result") is None


def test_every_length_but_the_whole_is_refused(tmp_path):
    store = Store(tmp_path, {})
    store.save("result", RECORD)
    whole = store.path("result").read_bytes()
    for length in range(0, len(whole), 7):
        store.path("result").write_bytes(whole[:length])
        with pytest.warns(RuntimeWarning, match="cut short, damaged or was edited"):
            assert store.load("result") is None
    store.path("result").write_bytes(whole + b"0")
    with pytest.warns(RuntimeWarning):
        assert store.load("result") is None


def test_every_changed_byte_is_noticed(tmp_path):
    store = Store(tmp_path, {})
    store.save("result", RECORD)
    whole = store.path("result").read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        store.path("result").write_bytes(changed)
        with pytest.warns(RuntimeWarning):
            assert store.load("result") is None


def test_a_file_under_the_name_of_another_request_is_refused(tmp_path):
    one, other = Store(tmp_path, {"n": 1}), Store(tmp_path, {"n": 2})
    one.save("result", RECORD)
    os.replace(one.path("result"), other.path("result"))
    with pytest.warns(RuntimeWarning, match="of another format or request"):
        assert other.load("result") is None


def test_a_save_that_fails_leaves_the_earlier_file_and_no_other(tmp_path, monkeypatch):
    store = Store(tmp_path, {})
    store.save("result", RECORD)

    def fail(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.warns(RuntimeWarning, match="cannot be written .No space left"):
        store.save("result", Record({}, {}))
    assert store.load("result").fields == RECORD.fields
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupt_while_writing_leaves_no_part(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    store = Store(tmp_path, {})
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.save("result", RECORD)
    assert not list(tmp_path.iterdir())


def test_bad_directory(tmp_path):
    with pytest.raises(TypeError, match="`cache_dir` to be a path.*Received: cache_dir=3"):
        Store(3, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Store(tmp_path / "file", {})


def test_digest_is_of_the_numbers():
    assert digest(np.ones((2, 3))) == digest(np.ones((3, 2)).T) != digest(np.zeros((2, 3)))
