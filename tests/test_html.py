"""What notebooks show of plans, statements, comparisons and strategies."""

import xml.etree.ElementTree as tree

import pytest

import keras_bandmf as bandmf
from keras_bandmf import strategies
from tests.plans import make_plan


def cells(shown):
    """The texts of the cells of well-formed HTML, row by row, and the text below the table."""
    root = tree.fromstring(f"<div>{shown._repr_html_()}</div>")
    rows = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
    return rows, ["".join(p.itertext()) for p in root.iter("p")]


@pytest.mark.parametrize("sampling", ["cyclic_poisson", "fixed_order"])
def test_a_plan_shows_what_it_prints(sampling):
    plan = make_plan(sampling=sampling)
    rows, _ = cells(plan)
    printed = [line.split() for line in str(plan).splitlines()[1:]]
    assert printed == [f"{name} {text}".split() for name, text in rows]


def test_a_statement_shows_what_it_prints():
    statement = make_plan(delta=0.1).statement()
    rows, _ = cells(statement)
    printed = " ".join(str(statement).split())
    for name, text in rows:
        assert " ".join(text.split()) in printed, name
    shown = " ".join(text for _, text in rows)
    for text in (*statement.caveats, *statement.not_covered):
        assert text in shown
    assert "exceeds 1 / num_examples" in shown and "(epsilon, delta)" in shown


def test_a_statement_that_is_not_private_says_so_first():
    rows, _ = cells(make_plan(noise_multiplier=0.0).statement())
    assert rows[0][0] == "NOT PRIVATE"
    assert "would be" in rows[1][1]


def test_the_best_number_of_bands_is_bold():
    choice = bandmf.compare_bands(
        num_examples=10**8, batch_size=50_000, num_steps=2_000, epsilon=2.0, delta=1e-9, max_bands=4
    )
    rows, notes = cells(choice)
    assert [row[0] for row in rows[1:]] == [str(c.num_bands) for c in choice.candidates]
    bold = tree.fromstring(f"<div>{choice._repr_html_()}</div>").findall(".//b")
    assert bold[0].text == str(choice.best.num_bands)
    assert "limit of 4 bands" in notes[0]


@pytest.mark.parametrize("kind", [strategies.ToeplitzStrategy, strategies.BandedStrategy])
def test_strategies_show_their_error(kind):
    strategy = kind.optimize(num_steps=20, num_bands=3)
    rows, _ = cells(strategy)
    assert ["bands", "3"] in rows and ["steps", "20"] in rows
    (error,) = (float(text) for name, text in rows if name.startswith("RMSE"))
    assert error == pytest.approx(strategy.loss("mean") ** 0.5, rel=1e-4)
