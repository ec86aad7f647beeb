"""What is committed and what is shipped: clean notebooks, and a wheel with the code and nothing else."""

import ast
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from keras_mml import layers

pytestmark = pytest.mark.any_backend  # files

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_notebooks_are_executed_and_clean(path):
    text = path.read_text(encoding="utf8")
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    assert any(c["outputs"] for c in cells), "no saved outputs"
    assert all(c.get("execution_count") is None for c in cells)
    assert not re.search(r"(?<![\w.])/(home|root|Users|tmp|work)/\w", text), "a path of somebody's machine"
    for cell in cells:
        if any(line.startswith("#| fig-alt:") for line in cell["source"]):
            assert any("image/svg+xml" in o.get("data", {}) for o in cell["outputs"]), "a plot is missing"
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            shown = "".join(output.get("text", [])) + "".join(output.get("data", {}).get("text/plain", []))
            assert "\x1b[" not in shown and "\r" not in shown and "\b" not in shown


def test_every_public_name_is_documented():
    "It has a docstring, and its cell is shown on a page: not hidden, and exported from a notebook that has a place in the sidebar."
    sidebar = (ROOT / "_quarto.yml").read_text(encoding="utf8")
    shown = set()
    for path in NOTEBOOKS:
        sources = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf8"))["cells"] if c["cell_type"] == "code"]
        module = next((m[1] for s in sources if (m := re.search(r"^#\| default_exp (\S+)", s, re.M))), None)
        if module and f"href: {path.relative_to(ROOT / 'nbs').as_posix()}" in sidebar:
            for source in sources:
                if re.search(r"^#\| exports?$", source, re.M) and "#| hide" not in source:
                    shown |= {(module, n.name) for n in ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M)).body if hasattr(n, "name")}
    for path in (ROOT / "keras_mml").rglob("*.py"):
        module = path.relative_to(ROOT / "keras_mml").with_suffix("").as_posix().replace("/", ".")
        tree = ast.parse(path.read_text(encoding="utf8"))
        exported = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"), [])
        for node in tree.body:
            if getattr(node, "name", None) in exported:
                assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"
                assert (module, node.name) in shown, f"{module}.{node.name} is not shown"


@pytest.mark.parametrize("name", layers.__all__)
def test_layers_say_what_they_take_and_show_an_example(name):
    "Their own docstring names arguments, shapes and errors, or the layer that has the same ones; doctest runs the example."
    text = getattr(layers, name).__doc__
    assert "Example:\n\n    ```python\n    >>> " in text
    parts = ("Args:", "Output shape:", "Raises:", "Input shape:" if "Input shape:" in text else "Call arguments:")
    assert all(part in text for part in parts) or re.search(r"[Aa]rguments\b.* those of `\w+MML`", text)


def test_the_wheel_holds_the_package_and_no_data(tmp_path):
    pytest.importorskip("build")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "keras_mml/layers/dense.py" in names and any(n.endswith("LICENSE") for n in names)
    assert all(n.startswith("keras_mml") for n in names)
    assert all(n.endswith((".py", ".so", ".pyd")) or ".dist-info/" in n for n in names)  # no data, no C
    assert wheel.stat().st_size < 225_000


def test_loading_the_package_registers_the_layers():
    code = "import keras, keras_mml; print(keras.saving.get_registered_object('keras_mml>DenseMML') is keras_mml.layers.DenseMML)"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert output.strip() == "True"


def test_the_oldest_keras_that_is_tested_is_the_one_that_is_declared():
    (declared,) = re.findall(r'"keras>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert re.search(rf"^keras=={re.escape(declared)}(\.0)?$", (ROOT / "constraints-minimum.txt").read_text(), re.M)
    assert f"keras>={declared} " in (ROOT / "settings.ini").read_text()
