"""The website in a real browser: every page on a wide and a narrow screen, light and dark, and what readers and machines find there."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if os.environ.get("KERAS_BACKEND", "torch") != "torch":
    pytest.skip("The website is the same on every backend; it is tested with torch's.", allow_module_level=True)
if CHROMIUM is None:
    pytest.skip("The website was not tested: no Chromium here. Install one: apt-get install chromium", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api")
Axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe
filelock = pytest.importorskip("filelock")
sys.path.insert(0, str(ROOT / "tools"))
import build_site
import check_site

BASE = "/keras_mml"  # where the published site lives below its host
PAGES = sorted(p.relative_to(ROOT / "nbs").with_suffix(".html").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PAGES += ["changelog.html", "404.html"]
SCREENS = [("wide", {"width": 1280, "height": 900}), ("narrow", {"width": 390, "height": 844})]
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def site():
    "The site of the present sources, built by the first process that asks."
    (ROOT / "_build").mkdir(exist_ok=True)
    with filelock.FileLock(ROOT / "_build" / "site.lock"):
        if not build_site.is_current():
            done = subprocess.run([sys.executable, "tools/build_site.py", "--saved"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return build_site.SITE


class Handler(http.server.SimpleHTTPRequestHandler):
    "The site below BASE, with its 404 page, as GitHub Pages serves it."

    def translate_path(self, path):
        return super().translate_path(path.removeprefix(BASE)) if path.startswith(BASE + "/") else "/nowhere"

    def send_error(self, code, message=None, explain=None):
        body = (Path(self.directory) / "404.html").read_bytes()
        self.send_response(code)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}{BASE}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser):
    context = browser.new_context(reduced_motion="reduce")
    yield context
    context.close()


@pytest.fixture
def visit(context, address):
    "Open a page, and note whatever goes wrong from then on."
    page, problems = context.new_page(), []
    page.on("console", lambda message: message.type == "error" and problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))
    page.on("request", lambda request: request.url.startswith((address, "data:", "blob:", "file:")) or problems.append(f"external: {request.url}"))
    page.problems = problems

    def open_page(url, **options):
        page.goto(url if "://" in url else address + url, wait_until="load", **options)
        return page

    yield open_page
    page.close()


LAYOUT = """() => {
  const wrong = [], root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) {
    const wide = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > root.clientWidth + 1);
    wrong.push(`the page scrolls sideways: ${root.scrollWidth} > ${root.clientWidth}: ` + wide.slice(0, 3).map(e => e.outerHTML.slice(0, 90)));
  }
  for (const image of document.images) if (!image.complete || !image.naturalWidth) wrong.push("broken image " + image.src);
  let last = 0;
  for (const heading of document.querySelectorAll("main :is(h1, h2, h3, h4, h5, h6)")) {
    const level = +heading.tagName[1];
    if (level > last + 1) wrong.push(`h${level} "${heading.textContent}" follows h${last}`);
    last = level;
  }
  if (document.querySelectorAll("h1").length !== 1) wrong.push("not exactly one h1");
  return wrong;
}"""

# after a key was pressed, what gets the focus shows it
FOCUS = """() => {
  const invisible = [];
  for (const element of document.querySelectorAll("a[href], button, input, summary, [tabindex='0']")) {
    if (!element.checkVisibility({visibilityProperty: true})) continue;
    element.focus({preventScroll: true});
    if (document.activeElement !== element) continue;
    const style = getComputedStyle(element);
    if ((style.outlineStyle === "none" || parseFloat(style.outlineWidth) < 1) && style.boxShadow === "none") invisible.push(element.outerHTML.slice(0, 120));
  }
  return invisible;
}"""


def violations(page, rules=None):
    options = {"runOnly": rules} if rules else {}
    results = Axe().run(page, options={**options, "resultTypes": ["violations"]}).response["violations"]
    return [f"{v['id']}: {node['target']} {node.get('failureSummary', '')[:300]}" for v in results if v["impact"] in SERIOUS for node in v["nodes"][:4]]


@pytest.mark.parametrize("path", PAGES)
def test_page(visit, path):
    "One visit: wide and narrow, light and dark."
    page = visit(path)
    wrong = []
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    for name, size in SCREENS:
        page.set_viewport_size(size)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            page.wait_for_function("dark => document.documentElement.classList.contains('quarto-dark') === dark", arg=scheme == "dark")
            found = violations(page) if scheme == "light" else violations(page, ["color-contrast"])
            if scheme == "light":
                found += page.evaluate(LAYOUT)
            wrong += [f"{name}, {scheme}: {f}" for f in found]
    page.set_viewport_size(SCREENS[0][1])
    page.keyboard.press("Tab")
    wrong += [f"focus does not show: {e}" for e in page.evaluate(FOCUS)]
    assert not wrong + page.problems, "\n".join(wrong + page.problems)
