"""Execute notebooks in place: their outputs are saved with a fingerprint of the code that they come from.

    python tools/execute.py            those whose code is newer than their outputs
    python tools/execute.py --all      all of them
    python tools/execute.py --check    none: name those that are not current, and fail if there are any
    python tools/execute.py nbs/a.ipynb nbs/b.ipynb

Cells with `#| eval: false` are skipped. Ctrl-C ends it at once; notebooks that were finished are kept.
"""

import argparse
import hashlib
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "nbs"
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


def fingerprint(notebook):
    "Of what a notebook shows: its code, and the saved measurements that the code names."
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    digest = hashlib.sha256(code.encode())
    for path in sorted((NOTEBOOKS / "benchmarks").glob("*.json")):
        if re.search(rf"\b{path.stem}\b", code):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def is_current(path):
    notebook = nbformat.read(path, 4)
    return notebook.metadata.get("executed") == fingerprint(notebook)


def shown(text):
    "Without colours, and without what TensorFlow says of itself."
    return NATIVE_LOG.sub("", ANSI.sub("", text))


def tidy(outputs):
    "Outputs as they belong into a committed notebook: no colours, no dates, no counts."
    for output in outputs:
        if "execution_count" in output:
            output.execution_count = None
        if output.output_type == "stream":
            output.text = shown(output.text)
        for mime, data in output.get("data", {}).items():
            if mime in ("text/plain", "image/svg+xml"):
                output.data[mime] = re.sub(r"\s*<dc:date>.*?</dc:date>", "", ANSI.sub("", data))
    return [output for output in outputs if output.output_type != "stream" or output.text.strip()]


class Client(NotebookClient):
    "A client that skips `#| eval: false` and reports every cell."

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        skip = cell.cell_type == "code" and re.search(r"^\s*#\s*\|\s*eval:\s*false", cell.source, re.M)
        result = cell if skip else await super().async_execute_cell(cell, cell_index, **kwargs)
        self.report()
        return result


def execute(path, bar, running):
    "Execute a notebook, and write it by way of a temporary file, so that an interruption never leaves half of one."
    start, notebook = time.time(), nbformat.read(path, 4)
    key = fingerprint(notebook)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STYLE))
    options = dict(timeout=None, kernel_name="python3", extra_arguments=["--log-level=ERROR"], coalesce_streams=True)
    client = Client(notebook, resources={"metadata": {"path": str(path.parent)}}, **options)
    client.report = bar.update
    running.append(client)
    client.execute()
    running.remove(client)
    del notebook.cells[0]
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = None, tidy(cell.outputs)
    notebook.metadata.pop("language_info", None)
    notebook.metadata["executed"] = key
    temporary = path.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    os.replace(temporary, path)
    bar.write(f"  {os.path.relpath(path, NOTEBOOKS)}: {time.time() - start:.0f} s")


def execute_all(paths):
    "Execute notebooks, two at a time, which beats one with two threads. Whether all of them ran to their end."
    running, complete = [], True

    def stop(*_):  # kernels are in sessions of their own, which no Ctrl-C reaches
        for client in running:
            if client.km is not None and client.km.has_kernel:
                os.killpg(client.km.provisioner.pid, signal.SIGKILL)
        os._exit(130)

    for name in (signal.SIGINT, signal.SIGTERM):  # also in the background, where shells have SIGINT ignored
        signal.signal(name, stop)
    cells = sum(len(nbformat.read(path, 4).cells) + 1 for path in paths)
    with tqdm(total=cells, unit="cell") as bar, ThreadPoolExecutor(2) as pool:
        for path, future in [(path, pool.submit(execute, path, bar, running)) for path in paths]:
            try:
                future.result()
            except CellExecutionError as error:
                complete = False
                bar.write(f"\n{os.path.relpath(path, ROOT)} failed:\n{shown(str(error))}")
    return complete


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=lambda p: Path(p).resolve(), help="default: all of them")
    parser.add_argument("--all", action="store_true", help="execute also those whose outputs are current")
    parser.add_argument("--check", action="store_true", help="execute nothing, and fail if outputs are older than their code")
    args = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "torch")
    os.environ.pop("MPLBACKEND", None)  # plots belong into the notebook, whatever the shell says
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    hidden = lambda path: any(part[0] in "._" for part in path.relative_to(NOTEBOOKS).parts)
    every = args.notebooks or sorted(path for path in NOTEBOOKS.rglob("*.ipynb") if not hidden(path))
    stale = [path for path in every if args.all or args.notebooks or not is_current(path)]
    if args.check and stale:
        names = "".join(f"\n  {path.relative_to(ROOT)}" for path in stale)
        sys.exit(f"The outputs of these notebooks are older than their code. Run 'make notebooks' and commit what it saves:{names}")
    print(f"→ {len(every) - len(stale)} notebooks have current outputs, {len(stale)} are executed")
    if stale and not execute_all(sorted(stale, key=lambda path: "tutorials" not in path.parts)):  # the longest first
        sys.exit("A notebook failed. Fix the cell above and run the same command again; the others are kept.")


if __name__ == "__main__":
    main()
