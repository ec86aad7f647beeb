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
# Colours, dates of plots, and what TensorFlow's C++ prints while Keras imports it, wherever it happens to be installed
NOISE = re.compile(
    r"\x1b\[[0-9;]*[A-Za-z]|\s*<dc:date>.*?</dc:date>"
    r"|^(?:WARNING: All log messages before absl.*|[IWE]0000 \d+.*|To enable the following instructions:.*)\n?",
    re.M,
)
KERNEL = ["--log-level=ERROR", "--InlineBackend.figure_formats=svg"]  # plots are sharp


def fingerprint(notebook):
    "Of what a notebook shows: its code, and the saved measurements that the code names."
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    digest = hashlib.sha256(code.encode())
    for path in sorted((NOTEBOOKS / "benchmarks").glob("*.json")):
        if re.search(rf'\b{path.stem}\.json|saved\("{path.stem}"\)', code):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def is_current(path):
    return (notebook := nbformat.read(path, 4)).metadata.get("executed") == fingerprint(notebook)


def shown(text):
    "Without colours, dates of plots, and what TensorFlow says of itself."
    return NOISE.sub("", text)


def tidy(outputs):
    "Outputs as they belong into a committed notebook."
    for output in outputs:
        if "execution_count" in output:
            output.execution_count = None
        if output.output_type == "stream":
            output.text = shown(output.text)
        for mime in {"text/plain", "image/svg+xml"} & set(output.get("data", {})):
            output.data[mime] = shown(output.data[mime])
    return [output for output in outputs if output.output_type != "stream" or output.text.strip()]


def execute(path, bar, running):
    "Execute a notebook, and write it by way of a temporary file, so that an interruption never leaves half of one."
    start, notebook = time.time(), nbformat.read(path, 4)
    notebook.metadata["executed"] = fingerprint(notebook)  # before: saved measurements may change meanwhile
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.metadata.tags = ["skip"] * bool(re.search(r"^\s*#\s*\|\s*eval:\s*false", cell.source, re.M))
    options = dict(timeout=None, kernel_name="python3", extra_arguments=KERNEL, coalesce_streams=True, skip_cells_with_tag="skip")
    client = NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}}, **options)
    client.on_cell_start = lambda **_: bar.update()
    running.append(client)
    client.execute()
    running.remove(client)
    for cell in code:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key not in ("tags", "execution")}
        cell.execution_count, cell.outputs = None, tidy(cell.outputs)
    notebook.metadata.pop("language_info", None)
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
    cells = sum(len(nbformat.read(path, 4).cells) for path in paths)
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
    os.environ["MATPLOTLIBRC"] = str(NOTEBOOKS)  # their style
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
