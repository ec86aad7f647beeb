"""The way of the notebooks to Colab, without the network: a machine with nothing but pip, and an empty folder."""

import ast
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PACKAGE, CHECKOUT = "keras_mml[plot] @ git+https://github.com/keras-mml/keras_mml", "./keras_mml[plot]"
INSTALLED = {"keras_mml", "keras", "numpy", "matplotlib", "h5py", "rich"}  # by our wheel
INSTALLED |= {"IPython", "torch", "jax", "tensorflow", "google", "pandas", "psutil"}  # in Colab since ever
MODULES = {"scikit-learn": "sklearn"}  # where the package has another name than its module
if os.environ.get("KERAS_BACKEND", "torch") != "torch":
    pytest.skip("Notebooks install the same on every backend; torch's run tests it.", allow_module_level=True)
nbclient = pytest.importorskip("nbclient")


def code_cells(path):
    return [cell["source"] for cell in nbformat.read(path, 4).cells if cell["cell_type"] == "code"]


def name(path):
    return path.relative_to(ROOT / "nbs").as_posix()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_the_first_cell_installs_what_is_imported(path):
    cells = code_cells(path)
    install = next(cell for cell in cells if not re.fullmatch(r"#\| default_exp \S+\s*", cell))
    in_c = path.parent.name == "native"  # the files of the library are in a checkout alone
    clone, package = ("    !git clone [^\n]*\n", f'-e "{CHECKOUT}"') if in_c else ("", f'"{PACKAGE}"')
    assert re.match(f'#\\| hide\nimport sys\nif "google.colab" in sys.modules:\n{clone}    %pip install -q ', install), install
    assert package in install and sum("google.colab" in cell for cell in cells) == 1
    wanted = re.search(r"%pip install -q (.*)", install)[1].replace(package, "").split()
    available = INSTALLED | {MODULES.get(package, package) for package in wanted} | set(sys.stdlib_module_names)
    code = "\n".join(re.sub(r"^(\s*)[%!].*", r"\1pass", cell, flags=re.M) for cell in cells if not cell.startswith("%%"))
    if "test_close" in code:
        assert "fastcore" in wanted
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {n.name for node in nodes if isinstance(node, ast.Import) for n in node.names}
    imported |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    assert {module.split(".")[0] for module in imported} <= available
    files = [line for line in code.split("\n") if re.search(r"[\"'(](\.\./|[\w/]+\.json\b)", line) and "raw" not in line]
    if any("Path(" in line for line in files):  # what lies beside the notebook in a checkout is fetched
        assert re.search(r"git clone|curl|urlopen|raw\.githubusercontent", "\n".join(cells)), files


COLAB = """
import shutil, sys, types
from pathlib import Path
sys.modules["google.colab"] = types.ModuleType("google.colab")
commands = []

def system(command):
    commands.append(command)
    if command.startswith("git clone -q --depth 1 https://github.com/keras-mml/keras_mml"):
        shutil.copytree({root!r} + "/nbs", "keras_mml/nbs", ignore=shutil.ignore_patterns(".*", "*.npz", "_quarto.yml"))

get_ipython().system = system
get_ipython().register_magic_function(commands.append, magic_name="pip")
"""


@pytest.mark.parametrize("path", ["benchmarks/accuracy.ipynb", "index.ipynb"])
def test_it_runs_from_an_empty_folder(path, tmp_path, monkeypatch):
    "With pip and git replaced by this checkout."
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # another test runs beside this one
    notebook = nbformat.read(ROOT / "nbs" / path, 4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(COLAB.format(root=str(ROOT))))
    notebook.cells.append(nbformat.v4.new_code_cell("import json; print(json.dumps(commands))"))
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    commands = json.loads(notebook.cells[-1].outputs[0]["text"])
    assert any(PACKAGE in command for command in commands)
    assert not any(re.search(r"\bfile:|/tmp|/home", command) for command in commands)
