"""Outputs of notebooks: where they come from, how they are saved, and that Ctrl-C ends their execution."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
execute = pytest.importorskip("execute", reason="needs the packages for development")
pytestmark = pytest.mark.any_backend


@pytest.fixture
def notebook(tmp_path):
    "Write a notebook with these cells of code, and return its path."

    def write(*sources):
        path = tmp_path / "page.ipynb"
        nbformat.write(new_notebook(cells=[new_markdown_cell("# A page"), *map(new_code_cell, sources)]), path)
        return path

    return write


def run(*arguments, **options):
    command = [sys.executable, str(ROOT / "tools" / "execute.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def test_outputs_are_current_until_the_code_changes(notebook):
    path = notebook("print(6 * 7)", "#| eval: false\nraise ValueError")
    assert not execute.is_current(path)
    process = run(path)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    executed = nbformat.read(path, 4)
    assert execute.is_current(path) and executed.cells[1].outputs[0].text == "42\n" and executed.cells[1].execution_count is None
    executed.cells[0].source = "# Another title"
    nbformat.write(executed, path)
    assert execute.is_current(path)
    executed.cells[1].source = "print(6 * 8)"
    nbformat.write(executed, path)
    assert not execute.is_current(path)


def test_a_notebook_that_fails_is_not_written(notebook):
    path = notebook("print(1)", "1 / 0")
    before = path.read_bytes()
    process = run(path)
    output, _ = process.communicate()
    assert process.returncode == 1 and "ZeroDivisionError" in output and "\x1b" not in output and path.read_bytes() == before


def test_saved_measurements_are_part_of_the_fingerprint(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    file = tmp_path / "benchmarks" / "speed.json"
    monkeypatch.setattr(execute, "NOTEBOOKS", tmp_path)
    pages = [new_notebook(cells=[new_code_cell(code)]) for code in ('saved("speed")', 'saved("accuracy")')]
    file.write_text("1")
    before = [execute.fingerprint(page) for page in pages]
    file.write_text("2")
    assert [execute.fingerprint(page) == old for page, old in zip(pages, before, strict=True)] == [False, True]


def test_outputs_are_tidy(notebook):
    svg = "display({'image/svg+xml': '<svg><dc:date>2020</dc:date></svg>'}, raw=True)"
    path = notebook("print('50 %', end='\\r')\nprint('100 %')\nprint('\\x1b[31mred\\x1b[0m')", svg, "print()")
    run(path).communicate()
    _, text, picture, nothing = nbformat.read(path, 4).cells
    assert [output.text for output in text.outputs] == ["100 %\nred\n"] and nothing.outputs == []
    assert picture.outputs[0].data["image/svg+xml"] == "<svg></svg>"


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
def test_it_ends_at_once_also_where_interrupts_are_ignored(notebook, tmp_path):
    "As a shell starts what runs in the background. Neither the kernel nor what it started lives on."
    path = notebook(
        f"import os, subprocess, time\nchild = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(tmp_path / 'pids.tmp')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        f"os.rename({str(tmp_path / 'pids.tmp')!r}, {str(tmp_path / 'pids')!r})\ntime.sleep(600)"
    )
    before = path.read_bytes()
    process = run(path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    while not (tmp_path / "pids").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        while is_running(pid):  # the system takes a moment
            time.sleep(0.1)
    assert path.read_bytes() == before


def is_running(pid):
    "Neither gone nor only waiting to be buried."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
