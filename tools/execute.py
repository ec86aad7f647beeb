"""Execute the notebooks and keep the results in _build/nbs, as the site's source.

    python tools/execute.py            execute what changed since the last time
    python tools/execute.py --save     and copy the outputs into nbs/, to be committed
    python tools/execute.py nbs/a.ipynb nbs/b.ipynb

A notebook is executed again when its code, the package, or a saved benchmark changed. Cells with `#| eval: false` are skipped.
"""

import argparse
import hashlib
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SOURCE, BUILT = ROOT / "nbs", ROOT / "_build" / "nbs"
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# What TensorFlow's C++ prints while Keras imports it, wherever it happens to be installed
NATIVE_LOG = re.compile(r"^(WARNING: All log messages before absl.*|[IWE]0000 \d+.*|To enable the following instructions:.*)\n?", re.M)
# Sharp plots in the house style; what a reader's own Jupyter shows is up to them.
STYLE = """
%config InlineBackend.figure_formats = ["svg"]
%config InlineBackend.rc = {}
import matplotlib
matplotlib.rcParams.update({
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "figure.constrained_layout.use": True,
    "svg.hashsalt": "keras_mml", "image.interpolation": "nearest", "figure.dpi": 100,
})
"""


def notebooks():
    "All notebooks below nbs/, in a fixed order."
    return sorted(p for p in SOURCE.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(SOURCE).parts))


def shown(text):
    "What a terminal would show of `text`: carriage returns and backspaces applied, colours dropped."
    lines = []
    for line in NATIVE_LOG.sub("", ANSI.sub("", text)).split("\n"):
        screen, column = [], 0
        for char in line:
            if char == "\r":
                column = 0
            elif char == "\b":
                column = max(0, column - 1)
            else:
                screen[column:column + 1] = [char]
                column += 1
        lines.append("".join(screen).rstrip())
    return "\n".join(lines)


def tidy(notebook):
    "Leave only what belongs into a committed notebook."
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        merged = []
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
            if merged and output.output_type == "stream" and merged[-1].get("name") == output.name:
                merged[-1].text += output.text
            else:
                merged.append(output)
        for output in merged:
            if output.output_type == "stream":
                output.text = shown(output.text)
            for mime, data in list(output.get("data", {}).items()):
                if mime == "text/plain":
                    output.data[mime] = ANSI.sub("", data)
                if mime == "image/svg+xml":  # the date would make every run a change
                    output.data[mime] = re.sub(r"\s*<dc:date>.*?</dc:date>", "", data)
        cell.outputs = [o for o in merged if o.output_type != "stream" or o.text.strip()]
    return notebook


def fingerprint(notebook):
    "What the outputs of a notebook depend on: its code, the package, and the saved benchmarks."
    digest = hashlib.sha256()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            digest.update(cell.source.encode() + b"\0")
    for path in sorted([*(ROOT / "keras_mml").rglob("*.py"), *(SOURCE / "benchmarks").glob("*.json"), Path(__file__)]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Client(NotebookClient):
    "A client that skips `#| eval: false` and reports every cell."

    report = staticmethod(lambda: None)

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        skip = cell.cell_type == "code" and re.search(r"^\s*#\s*\|\s*eval:\s*false", cell.source, re.M)
        result = cell if skip else await super().async_execute_cell(cell, cell_index, **kwargs)
        self.report()
        return result


def execute(path, bar):
    "Execute one notebook into _build/nbs and say how long it took."
    name, start = path.relative_to(SOURCE).with_suffix(""), time.time()
    notebook = nbformat.read(path, 4)
    key = fingerprint(notebook)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STYLE))
    client = Client(notebook, timeout=None, kernel_name="python3", extra_arguments=["--log-level=ERROR"], resources={"metadata": {"path": str(path.parent)}})
    client.report = bar.update
    client.execute()
    del notebook.cells[0]
    tidy(notebook).metadata["executed"] = key
    write(notebook, BUILT / path.relative_to(SOURCE))
    bar.write(f"  {name}: {time.time() - start:.0f} s")


def write(notebook, path):
    "Write a notebook by way of a temporary file, so that an interruption never leaves half of one."
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    os.replace(temporary, path)


def is_current(path):
    "Whether the outputs in _build/nbs come from the present code."
    built = BUILT / path.relative_to(SOURCE)
    return built.exists() and nbformat.read(built, 4).metadata.get("executed") == fingerprint(nbformat.read(path, 4))


def refresh_prose(path):
    "Take the text of the source and the outputs of the last execution, which is of the same code."
    built, source = nbformat.read(BUILT / path.relative_to(SOURCE), 4), nbformat.read(path, 4)
    outputs = iter([cell.outputs for cell in built.cells if cell.cell_type == "code"])
    for cell in source.cells:
        if cell.cell_type == "code":
            cell.outputs = next(outputs)
    source.metadata["executed"] = built.metadata["executed"]
    write(source, BUILT / path.relative_to(SOURCE))


def save(path):
    "Copy the outputs into the source, without our own metadata."
    notebook = nbformat.read(BUILT / path.relative_to(SOURCE), 4)
    notebook.metadata.pop("executed", None)
    write(notebook, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=lambda p: Path(p).resolve(), help="default: all of them")
    parser.add_argument("--save", action="store_true", help="copy the outputs into nbs/")
    parser.add_argument("--force", action="store_true", help="execute even what did not change")
    args = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "torch")
    os.environ.pop("MPLBACKEND", None)  # plots belong into the notebook, whatever the shell says
    os.environ["OMP_NUM_THREADS"] = "1"  # two notebooks at a time, one thread each, beat one with two
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    every = args.notebooks or notebooks()
    todo = [p for p in every if args.force or not is_current(p)]
    for path in every:
        if path not in todo:
            refresh_prose(path)
    print(f"→ executing {len(todo)} notebooks ({len(every) - len(todo)} are unchanged since they were executed)")
    failed = False
    todo.sort(key=lambda p: "tutorials" not in p.parts)  # the longest first
    cells = sum(len(nbformat.read(p, 4).cells) + 1 for p in todo)
    with tqdm(total=cells, unit="cell", disable=not todo) as bar, ThreadPoolExecutor(2) as pool:
        for path, future in [(path, pool.submit(execute, path, bar)) for path in todo]:
            try:
                future.result()
            except CellExecutionError as error:
                failed = True
                bar.write(f"\n{path.relative_to(ROOT)} failed:\n{shown(str(error))}")
    if failed:
        sys.exit("A notebook failed. Fix the cell above and run the same command again; the others are kept.")
    if args.save:
        for path in every:
            save(path)
        print("→ saved the outputs into nbs/")


if __name__ == "__main__":
    main()
