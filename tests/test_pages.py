"""The pages: every block of Python in README.md and in docs/ runs, in the order of its page.

The blocks of a page share one namespace and a folder of their own. What a page takes for granted,
such as the reader's data, stands before its first block in a comment that begins with "setup":
small stand-ins, of the kinds and shapes that the page speaks of.
"""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
# These take more than a few seconds.
SLOW = {"docs/audit.md", "docs/choosing_a_plan.md"}
# `tests/test_language_models_page.py` runs it, and looks at what comes out.
ELSEWHERE = {"docs/language_models.md"}
# TensorFlow takes the collective operations of a second `MirroredStrategy` for those of the first.
OWN_PROCESS = {"docs/distributed.md"}
# In a language of its own, a block must not look like Python that runs.
LANGUAGES = {"python", "bash", "text", "json"}

_BLOCKS = re.compile(
    r"^<!-- environment: (?P<environment>\w+) -->\n```python\n(?P<elsewhere>.*?)^```$"
    r"|^```python\n(?P<python>.*?)^```$|^<!-- setup\n(?P<setup>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """Code of a page, and the line of the page on which it begins.

    A block may need another environment, of a library that cannot share this one.
    """

    code: str
    line: int
    is_setup: bool
    environment: str | None = None


def name_of(page):
    """The path of a page in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks_of(text):
    """The blocks of Python of a page and their setups, in their order."""
    found = []
    for match in _BLOCKS.finditer(text):
        kind = match.lastgroup
        line = text.count("\n", 0, match.start(kind))
        found.append(Block(match[kind], line, kind == "setup", match["environment"]))
    return found


def shown(text):
    """The blocks that a reader sees."""
    return [block for block in blocks_of(text) if not block.is_setup]


def run(blocks, name):
    """Runs blocks in one namespace and returns it; an error names the line of the page."""
    namespace = {"__name__": "__page__"}
    for block in blocks:
        if block.environment is not None:
            continue
        exec(compile("\n" * block.line + block.code, name, "exec"), namespace)
    return namespace


def run_elsewhere(python, code, folder):
    """Runs code in a process of its own, and returns what it printed."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [python, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def statements_of(text):
    """The privacy statements that a page shows as printed."""
    return re.findall(r"^```text\n(Privacy statement.*?)^```$", text, re.MULTILINE | re.DOTALL)


def words(text):
    """Text without its numbers, which a newer SciPy may change in their last digits."""
    return re.sub(r"[0-9a-f]{12,}|[\d.]+(e-\d+)?", "#", " ".join(text.split()))


def pages_with_code():
    """The pages that have blocks, slow ones marked."""
    for page in PAGES:
        if shown(page.read_text(encoding="utf-8")):
            name = name_of(page)
            if name in ELSEWHERE:
                continue
            yield pytest.param(page, id=name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.filterwarnings("ignore::UserWarning")  # pages say in words what these warn of
@pytest.mark.parametrize("page", pages_with_code())
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    if name_of(page) in OWN_PROCESS:
        code = "\n".join(block.code for block in blocks_of(text) if block.environment is None)
        printed = run_elsewhere(sys.executable, code, tmp_path)
    else:
        run(blocks_of(text), name_of(page))
        printed = capsys.readouterr().out
    printed = words(printed)
    assert all(words(statement) in printed for statement in statements_of(text))


def blocks_elsewhere():
    """The blocks that need another environment, with their pages."""
    for page in PAGES:
        for block in shown(page.read_text(encoding="utf-8")):
            if block.environment is not None:
                yield pytest.param(block, id=f"{name_of(page)}-{block.line}")


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks_elsewhere())
def test_the_python_of_other_environments_runs(block, tmp_path):
    """The interpreter of environment X is what KERAS_BANDMF_PYTHON_X names."""
    variable = f"KERAS_BANDMF_PYTHON_{block.environment.upper()}"
    if variable not in os.environ:
        pytest.skip(f"{variable} names no interpreter")
    run_elsewhere(os.environ[variable], block.code, tmp_path)


def test_other_environments_are_those_of_the_migration_pages():
    assert {param.values[0].environment for param in blocks_elsewhere()} == {
        "jax_privacy",
        "opacus",
        "tf_privacy",
    }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_python_is_found(page):
    """Whatever a reader takes for a block of Python is one that the test above runs."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^[ >]*(?:```|~~~)(.*)$", text, re.MULTILINE)
    opening, closing = fences[::2], fences[1::2]
    assert not any(closing), "a block is not closed"
    assert set(opening) <= LANGUAGES
    assert opening.count("python") == len(shown(text))
    assert text.count("<!-- setup") == len(blocks_of(text)) - len(shown(text))


def test_the_pages_that_a_newcomer_reads_first_always_run():
    first = {"README.md", "docs/index.md", "docs/fit.md", "docs/statement.md"}
    assert first <= {param.id for param in pages_with_code()} - SLOW


def test_links_of_the_readme_lead_somewhere():
    """Those between pages are checked by `mkdocs build --strict`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^):]+?)(?:#([^)]*))?\)", text)
    assert len(links) > 20
    for path, anchor in links:
        page = ROOT / path
        assert page.is_file(), path
        if anchor:
            titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}


def test_slow_pages_exist():
    assert {name_of(page) for page in PAGES} >= SLOW | ELSEWHERE


def test_blocks_share_a_namespace_and_errors_name_their_line():
    text = (
        "# A\n\n<!-- setup\nx = 1\n-->\n\n```python\ny = x + 1\n```\n\n```python\nz = y + w\n```\n"
    )
    assert [block.is_setup for block in blocks_of(text)] == [True, False, False]
    with pytest.raises(NameError, match="'w'") as error:
        run(blocks_of(text), "page.md")
    assert error.traceback[-1].lineno + 1 == 12


def test_the_api_pages_name_every_public_object():
    import keras_bandmf

    pages = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").iterdir()}
    modules = {name for name in pages if f"::: keras_bandmf.{name}\n" in pages[name]}
    named = set(re.findall(r"^::: keras_bandmf\.(\w+)$", pages["keras_bandmf"], re.MULTILINE))
    same = {"make_private", "__version__"}  # named in the text
    assert all(f"`{name}`" in pages["keras_bandmf"] for name in same)
    assert named | same | modules >= set(keras_bandmf.__all__)
    assert modules - set(keras_bandmf.__all__) == {"plots", "tf_privacy"}
    assert all(f"({name}.md)" in pages["index"] for name in pages if name != "index")


def test_every_line_of_a_statement_is_explained():
    text = (ROOT / "docs/statement.md").read_text(encoding="utf-8")
    (statement,) = statements_of(text)
    table = statement.split("\n\n")[1]  # after the claim
    names = {line[:11].strip() for line in table.splitlines() if not line.startswith(" ")}
    assert {"epsilon", "delta", "at deltas", "run key", "plan"} <= names
    assert not {name for name in names if f"- **{name}**" not in text}
