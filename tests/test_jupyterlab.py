"""The first tutorial as readers run it: opened in JupyterLab, in a real browser, Run All Cells, to its end."""

import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keras_mml.testing import SHORT

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="JupyterLab was not tested: no Chromium here. Install one: apt-get install chromium"),
]
MINUTES = 15  # far more than it takes


@pytest.fixture
def lab(tmp_path):
    "The address of a JupyterLab on a copy of the notebooks, and its token."
    pytest.importorskip("jupyterlab")
    nbs = tmp_path / "nbs"
    shutil.copytree(ROOT / "nbs", nbs, ignore=shutil.ignore_patterns(".*", "_quarto.yml"))
    tutorial = nbs / "tutorials" / "mnist.ipynb"  # without outputs: what is on the page was computed there
    subprocess.run([sys.executable, "-m", "nbconvert", "--clear-output", "--inplace", tutorial], check=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    settings = tmp_path / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # all cells are on the page, also those far down
    environment["JUPYTERLAB_SETTINGS_DIR"] = str(tmp_path / "settings")
    token, log = secrets.token_hex(16), tmp_path / "lab.log"
    arguments = ["--no-browser", "--ServerApp.port=0", f"--IdentityProvider.token={token}", f"--notebook-dir={nbs}", "--allow-root"]
    with open(log, "w") as output:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *arguments], env=environment, stdout=output, stderr=output)
    try:
        deadline, found = time.time() + 120, None
        while found is None:
            assert server.poll() is None and time.time() < deadline, log.read_text()
            time.sleep(0.2)
            found = re.search(r"http://(?:localhost|127\.0\.0\.1):(\d+)/lab", log.read_text())
        yield f"http://127.0.0.1:{found[1]}/lab/tree", token
    finally:
        server.terminate()
        server.wait(120)


def run_all_cells(page):
    "Choose it in the menu, until the kernel takes the cells: the page may call it idle before it listens."
    for _ in range(10):
        page.click(".lm-MenuBar-itemLabel:text-is('Run')")
        page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
        time.sleep(10)
        if any(re.search(r"[*\d]", prompt) for prompt in page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()):
            return
    raise AssertionError(page.inner_text("body"))


def test_the_first_tutorial_runs_to_its_end(lab):
    address, token = lab
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{address}/tutorials/mnist.ipynb?token={token}&reset")
        notebook = page.locator(".jp-NotebookPanel")
        notebook.wait_for(timeout=120_000)
        page.locator(".jp-KernelName:has-text('Python 3')").wait_for(timeout=120_000)  # without a kernel it is called idle, too
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(timeout=120_000)
        assert notebook.locator(".jp-OutputArea-output").count() == 0
        run_all_cells(page)
        code = page.locator(".jp-CodeCell .jp-InputPrompt")
        deadline = time.time() + 60 * MINUTES
        while True:
            prompts = code.all_inner_texts()
            if prompts and all(re.fullmatch(r"\[\d+\]:", prompt) for prompt in prompts):
                break
            errors = page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']")
            assert errors.count() == 0, errors.first.inner_text()
            assert time.time() < deadline, prompts
            time.sleep(1)
        found = re.findall(r"test accuracy (\d+\.\d+)%", notebook.inner_text())
        assert len(found) == 1 and (80 if SHORT else 97.8) < float(found[0]) < 99.5  # the kernel runs short, too
        demo = notebook.locator(".digit-demo")
        demo.locator("button[aria-label='A handwritten 7']").click()
        demo.locator(".dd-digit:text-is('7')").wait_for()
        browser.close()
