"""The package is a house: an import only ever points down, and there are no circles. Drawn from the sources, lazy imports included."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_backend  # files

PACKAGE = Path(__file__).resolve().parent.parent / "keras_mml"
FLOORS = (  # from the ground up; a folder stands for all that is in it
    ("constants", "copies", "datasets", "hdf5", "keras_private", "testing"),
    ("quantizers", "normalization", "packing"),
    ("native",),
    ("layers",),
    ("graph",),
    ("conversion", "callbacks", "distribution"),
    ("runtime", "export"),
    ("inspection",),
    ("keras_mml",),  # the names that `import keras_mml` brings
    ("command_line",),
)


def modules(package):
    "The modules of a package by their names in it, such as `layers.dense`; the package itself has its own name."
    paths = [path for path in package.rglob("*.py") if not path.name.startswith("_modidx")]
    names = [path.relative_to(package).with_suffix("").as_posix().replace("/", ".").removesuffix("__init__").rstrip(".") for path in paths]
    return {name or package.name: path for name, path in zip(names, paths)}


def imports(package):
    "For each module those of the same package that it imports, at any place in its code."
    found = modules(package)
    return {name: set(_imported(name, path, package.name, found)) - {name} for name, path in found.items()}


def _imported(name, path, package, found):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # of a folder, its modules; of a module, its names
            folder = _folder(name, path, package, node.level) + (node.module or "")
            names = [f"{folder}.{alias.name}".replace("..", ".") for alias in node.names]
            names = [full if full.removeprefix(f"{package}.") in found else full.rpartition(".")[0] for full in names]
        else:
            continue
        yield from (full.removeprefix(f"{package}.") for full in names if full.removeprefix(f"{package}.") in found)


def _folder(name, path, package, dots):
    "What so many dots in front of a name stand for, with a dot behind it; nothing for none."
    steps = [package] if name == package else [package, *name.split(".")]
    up = dots - (path.name == "__init__.py")
    return ".".join(steps[: len(steps) - up]) + "." if dots else ""


def floor_of(module):
    "The number of its floor; an error names a module that has none."
    found = [number for number, names in enumerate(FLOORS) for name in names if f"{module}.".startswith(f"{name}.")]
    assert found, f"`{module}` has no floor yet: give it one in FLOORS"
    return found[0]


def test_every_import_points_down():
    up = [f"{a} → {b}" for a, targets in imports(PACKAGE).items() for b in targets if floor_of(a) < floor_of(b)]
    assert not up, up


def test_there_are_no_circles():
    try:
        TopologicalSorter(imports(PACKAGE)).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_no_floor_is_empty():
    found = modules(PACKAGE)
    assert not [name for names in FLOORS for name in names if name not in found]


def test_a_circle_and_an_arrow_upwards_would_be_seen(tmp_path):
    "In a house with both, one of them behind a function."
    package = tmp_path / "keras_mml"
    (package / "layers").mkdir(parents=True)
    (package / "__init__.py").write_text("from .layers import dense")
    (package / "layers" / "__init__.py").write_text("from .dense import Dense")
    (package / "layers" / "dense.py").write_text("from .. import quantizers\nfrom ..quantizers import get\nDense = 1")
    (package / "quantizers.py").write_text("import numpy\nget = 1\ndef f():\n    from keras_mml.layers.dense import Dense\n")
    drawn = imports(package)
    assert drawn == {name: {"quantizers" if name == "layers.dense" else "layers.dense"} for name in modules(package)}
    assert floor_of("quantizers") < floor_of("layers.dense")
    with pytest.raises(CycleError):
        TopologicalSorter(drawn).prepare()
