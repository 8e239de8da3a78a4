"""The structure of the package: BUILD names every file, imports run one way, files stay small."""

import ast
import pathlib
import re

import pytest
import tensorflow as tf

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "keras_bandmf"
COMMAND_LINE = ROOT / "keras_bandmf_cli"


def build_targets():
    """Evaluates BUILD, whose language is a subset of Python: target -> (files, dependencies)."""
    targets = {}

    def glob(patterns, exclude=(), **_):
        found = {str(path.relative_to(ROOT)) for p in patterns for path in ROOT.glob(p)}
        left_out = {str(path.relative_to(ROOT)) for p in exclude for path in ROOT.glob(p)}
        return sorted(found - left_out)

    def library(name, srcs, deps=(), **_):
        targets[name] = (srcs, [dependency.removeprefix(":") for dependency in deps])

    def ignore(*args, **kwargs):
        return None

    names = ("load", "package", "licenses", "exports_files", "filegroup", "py_test")
    rules = dict.fromkeys(names, ignore)
    rules |= {"glob": glob, "py_library": library, "py_binary": library}
    exec(compile((ROOT / "BUILD").read_text(), "BUILD", "exec"), rules)
    return targets


def test_build_names_every_file_once():
    files = [file for srcs, _ in build_targets().values() for file in srcs]
    assert len(files) == len(set(files))
    expected = {
        str(p.relative_to(ROOT))
        for folder in (PACKAGE, COMMAND_LINE, ROOT / "tests")
        for p in folder.rglob("*.py")
    }
    assert set(files) == expected - {"tests/run_pytest.py"}  # which is the main file of each test


def imported_modules(path):
    """The modules of the package that a file imports, as dotted names below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "keras_bandmf":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keras_bandmf."):
            found.add(node.module.removeprefix("keras_bandmf."))
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("keras_bandmf.")
                for alias in node.names
                if alias.name.startswith("keras_bandmf.")
            }
    return found


def test_imports_follow_the_dependencies_in_build():
    targets = build_targets()
    owner = {}
    for name, (srcs, _) in targets.items():
        for file in srcs:
            if file.startswith("keras_bandmf/"):
                owner[pathlib.Path(file).with_suffix("").parts[1]] = name

    def reachable(name):
        return {name}.union(*(reachable(dependency) for dependency in targets[name][1]))

    for path in PACKAGE.rglob("*.py"):
        name = owner[path.relative_to(PACKAGE).with_suffix("").parts[0]]
        for module in imported_modules(path):
            assert owner[module.split(".")[0]] in reachable(name), f"{path.name} imports {module}"


def test_targets_come_after_what_they_depend_on():
    seen = set()
    for name, (_, dependencies) in build_targets().items():
        assert set(dependencies) <= seen, name
        seen.add(name)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_library_files_are_small_and_never_assert_or_print(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 600
    tree = ast.parse(text)
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [f.lineno for f in calls if isinstance(f, ast.Name) and f.id == "print"]
    assert ast.get_docstring(tree)


def test_private_modules_of_keras_and_tensorflow_are_imported_in_one_file():
    private = re.compile(r"^\s*(?:from|import) (?:keras\.src|tensorflow\.python)\b", re.MULTILINE)
    found = {path.name for path in PACKAGE.rglob("*.py") if private.search(path.read_text())}
    assert found == {"_keras_internals.py"}


def test_dir_shows_public_names_only():
    import keras_bandmf

    assert sorted(dir(keras_bandmf)) == sorted(keras_bandmf.__all__)
    names = "audit callbacks clipping layers noise sources strategies tfx_input"
    for name in names.split():
        room = getattr(keras_bandmf, name)
        assert sorted(dir(room)) == sorted(room.__all__)
        assert all(getattr(room, public) is not None for public in room.__all__)
    assert all(getattr(keras_bandmf, public) is not None for public in keras_bandmf.__all__)
    assert keras_bandmf.make_private is keras_bandmf.privatize


def test_privacy_errors_can_be_told_from_slips():
    import keras_bandmf

    assert issubclass(keras_bandmf.PrivacyError, ValueError)

    @tf.function
    def refuses(x):
        if x.shape[0] == 1:
            raise keras_bandmf.PrivacyError("Received: one row")
        return x

    with pytest.raises(keras_bandmf.PrivacyError, match="one row"):
        refuses(tf.zeros([1]))
    raised = [path for path in PACKAGE.rglob("*.py") if "raise PrivacyError" in path.read_text()]
    assert len(raised) >= 10


DOCUMENTS = ("threat_model.md", "architecture.md", "notation.md")


def document(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def file_of(path):
    """The file that a document means: paths are relative to the repository or to the package."""
    return next((base / path for base in (ROOT, PACKAGE) if (base / path).exists()), None)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_files_that_exist(name):
    paths = set(re.findall(r"`([\w/]+\.py)`", document(name)))
    assert paths
    assert not {path for path in paths if file_of(path) is None}


def defined_names(path):
    """What a file defines: functions, classes and variables, and members as `Class.member`."""
    found = set()

    def collect(body, prefix):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    collect(node.body, f"{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [part for target in targets for part in ast.walk(target)]
                found.update(prefix + part.id for part in names if isinstance(part, ast.Name))

    collect(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_names_in_parentheses_after_a_file_are_defined_in_it(name):
    cited = re.findall(r"`([\w/]+\.py)`\s+\(([^)]*)\)", document(name))
    names = {(path, each) for path, text in cited for each in re.findall(r"`([\w.]+)`", text)}
    assert names
    assert not {
        (path, each)
        for path, each in names
        if file_of(path) is None or each not in defined_names(file_of(path))
    }


def test_the_map_states_the_imports_that_build_allows():
    text = document("architecture.md").split("## What may import what")[1].split("\n## ")[0]
    stated = {}
    for left, right in re.findall(r"^\| (`.+) \| (.+) \|$", text, re.MULTILINE):
        ground = {"basics"} if "the shared ground" in right else set()
        for room in re.findall(r"`(\w+)", left):
            stated[room] = ground | set(re.findall(r"`(\w+)", right))
    assert stated.keys() >= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    targets = build_targets()
    allowed = {room: set(targets[room][1]) for room in stated if room in targets}
    assert {room: stated[room] for room in allowed} == allowed


def test_the_map_names_every_room():
    folders = {path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("*/__init__.py")}
    rooms = {f"{folder.as_posix()}/" for folder in folders if folder.parts}
    assert len(rooms) > 10
    assert not rooms - set(re.findall(r"`([\w/]+/)`", document("architecture.md")))


def test_every_slow_case_has_a_test():
    """A line of tests/slow.txt whose test was renamed would mark nothing."""
    for line in (ROOT / "tests" / "slow.txt").read_text().splitlines():
        path, name = re.match(r"([^:]+)::(\w+)", line).groups()
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), line
