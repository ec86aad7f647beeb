"""The website in a real browser: every page on a wide and a narrow screen, light and dark, and what readers and machines find there."""

import functools
import http.server
import json
import os
import re
import shutil
import struct
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
ttLib = pytest.importorskip("fontTools.ttLib")
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
    context.set_default_timeout(120_000)  # other tests run beside these
    yield context
    context.close()


@pytest.fixture
def visit(context, address):
    "Open a page, and note whatever goes wrong from then on."
    page, problems = context.new_page(), []
    page.on("console", lambda message: message.type == "error" and problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    # what was still loading when the page was left is aborted: no failure
    page.on("requestfailed", lambda request: request.failure == "net::ERR_ABORTED" or problems.append(f"failed: {request.url}: {request.failure}"))
    page.on("request", lambda request: request.url.startswith((address, "data:", "blob:", "file:")) or problems.append(f"external: {request.url}"))
    page.problems = problems

    def open_page(url, **options):
        page.goto(url if "://" in url else address + url, wait_until="load", **options)
        return page

    yield open_page
    page.close()


LAYOUT = """async () => {
  const wrong = [], root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) {
    const wide = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > root.clientWidth + 1);
    wrong.push(`the page scrolls sideways: ${root.scrollWidth} > ${root.clientWidth}: ` + wide.slice(0, 3).map(e => e.outerHTML.slice(0, 90)));
  }
  for (const image of document.images) {
    image.loading = "eager";
    await image.decode().catch(() => wrong.push("broken image " + image.src));
  }
  for (const box of document.querySelectorAll("main *")) {
    if (box.scrollWidth > box.clientWidth + 1 && box.clientWidth && /auto|scroll/.test(getComputedStyle(box).overflowX) && box.tabIndex < 0 && !box.querySelector("a, button"))
      wrong.push("cannot be scrolled with the keyboard: " + box.outerHTML.slice(0, 90));
  }
  let last = 0;
  for (const heading of document.querySelectorAll("main :is(h1, h2, h3, h4, h5, h6)")) {
    const level = +heading.tagName[1];
    if (level > last + 1) wrong.push(`h${level} "${heading.textContent}" follows h${last}`);
    last = level;
  }
  if (document.querySelectorAll("h1").length !== 1) wrong.push("not exactly one h1");
  return wrong;
}"""

# code has thousands of words in a dozen colours, tables have many rows, formulas many pieces: a few of each kind stay for axe
THIN = """() => {
  const seen = new Set();
  document.querySelectorAll("main tbody tr:nth-child(n+4)").forEach(row => row.remove());
  for (const word of document.querySelectorAll("main pre span")) {
    const kind = word.parentElement.className + word.className + word.style.cssText;
    if (seen.has(kind)) word.replaceWith(...word.childNodes); else seen.add(kind);
  }
  document.querySelectorAll("main pre").forEach(pre => pre.normalize());
  for (const formula of [...document.querySelectorAll("main .katex")].slice(2)) formula.replaceWith(formula.textContent.slice(0, 20));
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
    page, wrong = visit(path), []
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    for name, size in SCREENS:  # as it is shown
        page.set_viewport_size(size)
        page.wait_for_timeout(50)
        wrong += [f"{name}: {found}" for found in page.evaluate(LAYOUT)]
    page.evaluate(THIN)
    for name, size in SCREENS:  # as it is read
        page.set_viewport_size(size)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function("dark => document.documentElement.classList.contains('quarto-dark') === dark", arg=scheme == "dark")
            wrong += [f"{name}, {scheme}: {found}" for found in violations(page, None if scheme == "light" else ["color-contrast"])]
    page.set_viewport_size(SCREENS[0][1])
    page.keyboard.press("Tab")
    wrong += [f"the focus does not show: {element}" for element in page.evaluate(FOCUS)]
    assert not wrong + page.problems, "\n".join(wrong + page.problems)


@pytest.mark.parametrize("words, place", [
    ("DenseMML", "layers/dense.html"), ("pack", "conversion.html"), ("absmean", "quantizers.html"),
    ("ternarize", "conversion.html"), ("LRUMML", "layers/recurrent.html"),
    ("install", "index.html"), ("mixed precision", "how-to/mixed-precision.html"), ("straight through", "explanations/straight-through.html"),
])  # fmt: skip
def test_search_finds_the_right_page_first(visit, words, place):
    page = visit("tutorials/mnist.html")
    page.fill("input[type=search]", words)
    first = page.wait_for_selector(".search-result")
    assert first.get_attribute("href").split("#")[0] == "../" + place
    found = page.eval_on_selector_all(".search-result", "results => results.map(a => a.getAttribute('href'))")
    assert len(set(found)) == len(found)
    first.click()
    page.wait_for_url(f"**/{place}*")
    assert not page.problems


def test_the_site_works_from_a_folder(visit, site):
    page = visit((site / "tutorials" / "mnist.html").as_uri())
    page.fill("input[type=search]", "DenseMML")
    page.wait_for_selector(".search-result").click()
    page.wait_for_url("**/layers/dense.html*")
    page.wait_for_selector(".katex")
    assert not page.problems


def test_the_404_page_works_at_any_depth(visit, address):
    page = visit("a/page/that/moved.html")
    assert page.problems == ["console: Failed to load resource: the server responded with a status of 404 (Not Found)"]
    page.problems.clear()
    page.fill("input[type=search]", "pack")
    page.wait_for_selector(".search-result").click()
    page.wait_for_url(address + "conversion.html*")
    assert not page.problems


def test_reading_order_and_what_leads_on(visit):
    "The pages follow each other as the sidebar lists them, each with breadcrumbs, its notebook and its source."
    page = visit("index.html")
    listed = page.eval_on_selector_all("#quarto-sidebar a.sidebar-link[href]", "links => links.map(a => a.href)")
    assert len(set(listed)) == len(listed) >= 30
    for here, next_page in zip(listed[:8], listed[1:9]):
        page.goto(here)
        assert page.get_attribute(".nav-page-next a", "href") and page.evaluate("document.querySelector('.nav-page-next a').href") == next_page
        if here != listed[0]:
            assert page.locator(".quarto-page-breadcrumbs li").count() >= 4  # above the page, and in the bar of narrow screens
        assert page.locator("a.toc-action", has_text="View source").count() == 1
    assert not page.problems


def test_the_keyboard_leads_past_the_frame(visit):
    page = visit("layers/dense.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the text"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('main').contains(document.activeElement)")
    section = page.locator(".sidebar-item-toggle").first
    for expanded in ("false", "true"):
        section.press("Enter")
        page.wait_for_function("([e, state]) => e.getAttribute('aria-expanded') === state", arg=[section.element_handle(), expanded])
        page.wait_for_timeout(500)  # it folds slowly
    assert not page.problems


def test_code_is_copied(visit, context):
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = visit("index.html")
    block = page.locator(".code-copy-outer-scaffold").first
    block.hover()
    block.locator("button").click()
    assert page.evaluate("navigator.clipboard.readText()").strip() == block.locator("code").inner_text().strip()


def test_the_choice_of_light_or_dark_stays(visit):
    page = visit("index.html")
    dark = "document.documentElement.classList.contains('quarto-dark')"
    before = page.evaluate(dark)
    page.click(".quarto-color-scheme-toggle")
    page.wait_for_function(f"{dark} !== {str(before).lower()}")
    page.goto(page.url.replace("index.html", "quantizers.html"))
    page.wait_for_function(f"{dark} !== {str(before).lower()}")
    page.evaluate("localStorage.clear()")


def test_plots_turn_over_in_the_dark(visit):
    page = visit("about:blank")
    filters = "[...document.querySelectorAll('main img')].map(image => getComputedStyle(image).filter)"
    for scheme, turned in (("light", False), ("dark", True)):
        page.emulate_media(color_scheme=scheme)
        visit("quantizers.html")
        found = page.evaluate(filters)
        assert found and all((f != "none") == turned for f in found), (scheme, found)


def test_print_has_the_text_and_not_the_frame(visit):
    page = visit("layers/dense.html")
    page.emulate_media(media="print")
    for frame in ("#quarto-header", "#quarto-sidebar", "#quarto-margin-sidebar", ".page-navigation", ".code-copy-button", ".notebook-links"):
        assert not page.locator(frame).first.is_visible(), frame
    assert page.locator("main h1").is_visible()
    assert page.evaluate("document.querySelector('main').getBoundingClientRect().left") < 60


def test_the_home_page_is_light(visit):
    page = visit("about:blank")
    loaded = []
    page.on("response", lambda response: loaded.append(len(response.body())))
    visit("index.html")
    page.wait_for_load_state("networkidle")
    assert sum(loaded) < 1_000_000


def test_every_icon_is_in_the_font(site):
    rules = "".join(sheet.read_text(encoding="utf8") for sheet in site.rglob("bootstrap-icons*.css"))
    icons = dict(re.findall(r"\.(bi-[\w-]+)::?before\s*\{\s*content:\s*\"(.)\"", rules))
    drawn = set(ttLib.TTFont(next(site.rglob("bootstrap-icons.woff2"))).getBestCmap())
    wanted = {name for path in PAGES for name in re.findall(r'class="bi (bi-[\w-]+)', (site / path).read_text(encoding="utf8"))}
    assert len(wanted) > 5 and {name for name in wanted if ord(icons[name]) not in drawn} == set()


def test_weight_links_and_pictures(site):
    assert not list(check_site.problems(site))
    assert sum(p.stat().st_size for p in site.rglob("*") if p.is_file() and p.suffix != ".ipynb") < 6_000_000
    for card in (site / "cards").glob("*.png"):
        data = card.read_bytes()
        assert len(data) <= 40_000 and struct.unpack(">II", data[16:24]) == (800, 420)


@pytest.mark.parametrize("path", PAGES)
def test_what_machines_read_of_a_page(site, path):
    text = (site / path).read_text(encoding="utf8")
    shown = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", text, flags=re.S)
    assert not re.findall(r"\]\([^)\s]*\)", shown)  # Markdown that was not understood
    meta = dict(re.findall(r'<meta (?:property|name)="([\w:]+)" content="([^"]*)"', text))
    assert meta["description"] and meta["description"] == meta["og:description"]
    assert meta["og:title"] and meta["twitter:card"] == "summary_large_image"
    assert (site / meta["og:image"].removeprefix(build_site.finish_site.address())).exists()
    if path in ("404.html", "changelog.html"):
        return
    notebook = Path(path).with_suffix(".ipynb")
    assert json.loads((site / notebook).read_text(encoding="utf8"))["cells"]
    assert f'href="{notebook.name}" download' in text
    assert f"https://colab.research.google.com/github/keras-mml/keras_mml/blob/main/nbs/{notebook.as_posix()}" in text
    assert text.count("colab.research") == 1  # one way to open it


def test_indexes_for_machines(site):
    host = build_site.finish_site.address()
    locations = [e.text for e in ElementTree.parse(site / "sitemap.xml").iter() if e.tag.endswith("loc")]
    assert sorted(locations) == sorted(host + p for p in PAGES if p != "404.html")
    linked = re.findall(r"\]\((https://[^)]*)\): \S", (site / "llms.txt").read_text(encoding="utf8"))
    assert sorted(linked) == sorted(host + p for p in PAGES if p != "404.html")
    feed = ElementTree.parse(site / "changelog.xml").getroot()
    entries = feed.findall("{http://www.w3.org/2005/Atom}entry")
    versions = re.findall(r"^## (\S+),", (ROOT / "CHANGELOG.md").read_text(encoding="utf8"), re.M)
    anchors = [e.find("{http://www.w3.org/2005/Atom}id").text.split("#")[1] for e in entries]
    assert anchors == [f"v{version}" for version in versions]
    assert all(f'id="{anchor}"' in (site / "changelog.html").read_text(encoding="utf8") for anchor in anchors)
    assert all("<li>" in e.find("{http://www.w3.org/2005/Atom}content").text for e in entries)


def test_every_public_name_has_a_section(site):
    "With a signature, a summary and a link to the source; and no section is about a name that is gone."
    pages = {path: (site / path).read_text(encoding="utf8") for path in PAGES}
    known = set()
    for name in build_site.finish_site.public_names():
        path, anchor = name["href"].split("#")
        text = pages[path]
        assert name["summary"] and f'id="{anchor}"' in text, name
        known.add((path, anchor))
        assert re.search(rf'/{name["module"].replace(".", "/")}\.py#L\d+"[^>]*>source</a></p>\s*(?:<section[^>]*>)?\s*<h[23][^>]*>{name["name"]}<', text), name
        assert re.search(rf"\b(?:def|class)\b.{{0,40}}{name['name']}\b", re.sub(r"<[^>]+>", "", text)), name
    documented = {(path, anchor) for path in pages for anchor in re.findall(r'>source</a></p>\s*(?:<section[^>]*>)?\s*<h[23] id="([\w.]+)"', pages[path])}
    assert {(p, a) for p, a in documented if "." not in a} <= known


def test_public_names_in_prose_are_links(site):
    "A name in backticks leads to its section."
    missing = []
    for path in PAGES:
        text = re.sub(r"<(pre|h[1-6]|nav|header)\b.*?</\1>", "", (site / path).read_text(encoding="utf8"), flags=re.S)
        text = re.sub(r"<a\b[^>]*>.*?</a>", "", text, flags=re.S)
        codes = re.findall(r"<code>(keras_mml(?:\.\w+)+|\w+MML)</code>", text)
        missing += [f"{path}: {code}" for code in codes if build_site.finish_site.place(code)]
    assert not missing, sorted(set(missing))
