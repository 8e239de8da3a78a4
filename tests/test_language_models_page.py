"""All code of the page on language models runs, in order, as a new user copies it."""

import pathlib
import re

import pytest

import keras_bandmf as bandmf
from tests import test_pages

pytest.importorskip("keras_hub")
pytest.importorskip("tokenizers")

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "language_models.md"


def test_the_page_runs_as_it_is_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = test_pages.blocks_of(PAGE.read_text(encoding="utf-8"))
    names = test_pages.run(blocks, test_pages.name_of(PAGE))
    model, printed = names["model"], capsys.readouterr().out
    assert len(blocks) >= 8
    statement = bandmf.statement(model)
    assert statement.private and statement.epsilon <= 8.0 and statement.num_bands == 16
    assert str(statement) in printed
    assert names["loss_after"] < names["loss_before"]
    assert re.search(r"\['the nurse \w+", printed), "nothing was generated after the prompt"
    assert (tmp_path / "served" / "saved_model.pb").exists()
    assert bandmf.clipping.explain(names["small"]).rows
