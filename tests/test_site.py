"""The website in a real browser: every page on a wide and a narrow screen, light and dark, and what readers and machines find there."""

import functools
import gzip
import http.server
import json
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
pytestmark = [pytest.mark.any_backend, pytest.mark.browser]
filelock = pytest.importorskip("filelock")
yaml = pytest.importorskip("yaml")
sys.path.insert(0, str(ROOT / "tools"))
import build_site
import check_site

from keras_mml.testing import SHORT

BASE = "/keras_mml"  # where the published site lives below its host
NOTEBOOKS = [path.relative_to(ROOT / "nbs") for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts]
PAGES = sorted(path.with_suffix(".html").as_posix() for path in NOTEBOOKS)
PAGES += ["changelog.html", "404.html"]
# Run short, every page is built and its links are checked, and one in five is looked at.
LATER = pytest.mark.skip(reason="Run short, one page in five is looked at.")
NOW = PAGES if not SHORT else [*PAGES[::5], "index.html", "404.html"]
LOOKED_AT = [page if page in NOW else pytest.param(page, marks=LATER) for page in PAGES]
SCREENS = [("wide", {"width": 1280, "height": 900}), ("narrow", {"width": 390, "height": 844})]
SERIOUS = ("serious", "critical")
# smalldocs marks the root, Quarto the body
DARK = "[document.documentElement, document.body].some(e => e.classList.contains('quarto-dark'))"


@pytest.fixture(scope="module")
def site():
    "The site of the present sources, built by the first process that asks."
    (ROOT / "_build").mkdir(exist_ok=True)
    with filelock.FileLock(ROOT / "_build" / "site.lock"):
        if not build_site.is_current():
            done = subprocess.run([sys.executable, "tools/build_site.py"], cwd=ROOT, capture_output=True, text=True)
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
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("The pages were not looked at: no Chromium here. Install one: apt-get install chromium")
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
    page.on("requestfailed", lambda r: r.failure == "net::ERR_ABORTED" or problems.append(f"failed: {r.url}: {r.failure}"))
    page.on("request", lambda r: r.url.startswith((address, "data:", "blob:", "file:")) or problems.append(f"external: {r.url}"))
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
    const examples = wide.slice(0, 3).map(e => e.outerHTML.slice(0, 90));
    wrong.push(`the page scrolls sideways: ${root.scrollWidth} > ${root.clientWidth}: ` + examples);
  }
  for (const image of document.images) {
    image.loading = "eager";
    await image.decode().catch(() => wrong.push("broken image " + image.src));
  }
  for (const box of document.querySelectorAll("main *")) {
    const scrolls = box.scrollWidth > box.clientWidth + 1 && box.clientWidth && /auto|scroll/.test(getComputedStyle(box).overflowX);
    if (scrolls && box.tabIndex < 0 && !box.querySelector("a, button"))
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
    const outlined = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1;
    if (!outlined && style.boxShadow === "none") invisible.push(element.outerHTML.slice(0, 120));
  }
  return invisible;
}"""


def violations(page, rules=None):
    Axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe
    options = {"runOnly": rules} if rules else {}
    results = Axe().run(page, options={**options, "resultTypes": ["violations"]}).response["violations"]
    nodes = [(found["id"], node) for found in results if found["impact"] in SERIOUS for node in found["nodes"][:4]]
    return [f"{rule}: {node['target']} {node.get('failureSummary', '')[:300]}" for rule, node in nodes]


@pytest.mark.parametrize("path", LOOKED_AT)
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
            page.wait_for_function(f"dark => {DARK} === dark", arg=scheme == "dark")
            wrong += [f"{name}, {scheme}: {found}" for found in violations(page, None if scheme == "light" else ["color-contrast"])]
    page.set_viewport_size(SCREENS[0][1])
    page.keyboard.press("Tab")
    wrong += [f"the focus does not show: {element}" for element in page.evaluate(FOCUS)]
    assert not wrong + page.problems, "\n".join(wrong + page.problems)


def search(page, words):
    "The links that are found: smalldocs has a field in the navbar, Quarto a button that opens one."
    page.locator("#quarto-search button:visible, input[type=search]:visible").first.click()
    page.locator("input[type=search]:visible").fill(words)
    results = page.locator(".search-result, .search-result-link")
    results.first.wait_for()
    return results


@pytest.mark.parametrize("words, place", [
    ("DenseMML", "layers/dense.html"), ("pack", "conversion.html"), ("absmean", "quantizers.html"),
    ("ternarize", "conversion.html"), ("LRUMML", "layers/recurrent.html"),
    ("install", "index.html"), ("mixed precision", "how-to/mixed-precision.html"),
    ("straight through", "explanations/straight-through.html"),
])  # fmt: skip
def test_search_finds_the_right_page_first(visit, address, words, place):
    page = visit("tutorials/mnist.html")
    results = search(page, words)
    found = results.evaluate_all("links => links.map(a => a.href)")
    assert re.split(r"[?#]", found[0])[0] == address + place
    assert len(set(found)) == len(found)
    results.first.click()
    page.wait_for_url(f"**/{place}*")
    assert not page.problems


def test_the_site_works_from_a_folder(visit, site):
    page = visit((site / "tutorials" / "mnist.html").as_uri())
    search(page, "DenseMML").first.click()
    page.wait_for_url("**/layers/dense.html*")
    page.wait_for_selector(".katex")
    assert not page.problems


def test_the_404_page_works_at_any_depth(visit, address):
    page = visit("a/page/that/moved.html")
    assert page.problems == ["console: Failed to load resource: the server responded with a status of 404 (Not Found)"]
    page.problems.clear()
    search(page, "pack").first.click()
    page.wait_for_url(address + "conversion.html*")
    assert not page.problems


def test_reading_order_and_what_leads_on(visit):
    "The pages follow each other as the sidebar lists them, each with breadcrumbs, its notebook and its source."
    page = visit("index.html")
    listed = page.eval_on_selector_all("#quarto-sidebar a.sidebar-link[href]", "links => links.map(a => a.href)")
    assert len(set(listed)) == len(listed) >= 30
    for here, next_page in zip(listed[:8], listed[1:9]):
        page.goto(here)
        assert page.evaluate("document.querySelector('.nav-page-next a').href") == next_page
        if here != listed[0]:
            assert page.locator(".quarto-page-breadcrumbs li").count() >= 4  # above the page, and in the bar of narrow screens
        assert page.locator("a.toc-action:visible", has_text="View source").count() == 1  # Quarto has another for narrow screens
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
    before = page.evaluate(DARK)
    page.locator(".quarto-color-scheme-toggle:visible").first.click()
    page.wait_for_function(f"{DARK} !== {str(before).lower()}")
    page.goto(page.url.replace("index.html", "quantizers.html"))
    page.wait_for_function(f"{DARK} !== {str(before).lower()}")
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
    frames = ("#quarto-header", "#quarto-sidebar", "#quarto-margin-sidebar", ".page-navigation", ".code-copy-button", ".notebook-links")
    for frame in frames:
        assert not page.locator(frame).first.is_visible(), frame
    assert page.locator("main h1").is_visible()
    assert page.evaluate("document.querySelector('main').getBoundingClientRect().left") < 60


def test_the_home_page_is_light(visit):
    page = visit("about:blank")
    loaded = []
    page.on("response", lambda response: loaded.append(len(gzip.compress(response.body()))))  # as GitHub Pages sends it
    visit("index.html")
    page.wait_for_load_state("networkidle")
    assert sum(loaded) < 1_000_000


def _darkest(svg):
    return build_site.finish_site.raster(svg).convert("L").getextrema()[0]


def test_text_in_pictures_is_drawn():
    "Also where a machine has no fonts."
    drawn = '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20" font-family="monospace">{}</svg>'
    dark = [_darkest(drawn.format(text)) < 100 for text in ("", '<text y="15">MML</text>')]
    assert dark == [False, True]


def test_weight_links_and_pictures(site):
    assert not list(check_site.problems(site))
    taken_along = (".ipynb", ".llms.md")  # or for machines
    shown = [p for p in site.rglob("*") if p.is_file() and not p.name.endswith(taken_along)]
    assert sum(p.stat().st_size for p in shown) < 12_000_000
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
    missing = f"{host}404.html"  # smalldocs lists it, Quarto does not
    assert sorted({*locations} - {missing}) == sorted({host + p for p in PAGES} - {missing})
    linked = re.findall(r"\]\((https://[^)]*)\)", (site / "llms.txt").read_text(encoding="utf8"))
    assert sorted(linked) == sorted(host + p.replace(".html", ".llms.md") for p in PAGES if p != "404.html")
    assert all((site / url.removeprefix(host)).stat().st_size > 300 for url in linked)
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
    known, heading = set(), r'>source</a></p>\s*(?:</section>\s*)*(?:<section[^>]*>\s*)?<h[23][^>]*>'
    for name in build_site.finish_site.public_names():
        path, anchor = name["href"].split("#")
        text = pages[path]
        assert name["summary"] and f'id="{anchor}"' in text, name
        known.add((path, name["name"]))
        assert re.search(rf'/{name["module"].replace(".", "/")}\.py#L\d+"[^>]*{heading}{name["name"]}<', text), name
        assert re.search(rf"\b(?:def|class)\b.{{0,40}}{name['name']}\b", re.sub(r"<[^>]+>", "", text)), name
    documented = {(path, name) for path in pages for name in re.findall(heading + r"([\w.]+)<", pages[path])}
    assert {(path, name) for path, name in documented if "." not in name} == known


def test_public_names_in_prose_are_links(site):
    "A name in backticks leads to its section."
    missing = []
    for path in PAGES:
        text = re.sub(r"<(pre|h[1-6]|nav|header)\b.*?</\1>", "", (site / path).read_text(encoding="utf8"), flags=re.S)
        text = re.sub(r"<a\b[^>]*>.*?</a>", "", text, flags=re.S)
        codes = re.findall(r"<code>(keras_mml(?:\.\w+)+|\w+MML)</code>", text)
        missing += [f"{path}: {code}" for code in codes if build_site.finish_site.place(code)]
    assert not missing, sorted(set(missing))


# ---- what Quarto would stumble over, on machines without it

CONFIG = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf8"))
IMPORTS = [
    '@import"https://fonts.org/css?a:0,4;1,7&b";', "@import url(https://fonts.org/a;b);", "@import url( '//fonts.org/a;b' ) screen;",
    "@IMPORT 'http://fonts.org/a';",
]  # fmt: skip


def processed_cells(site, kind):
    "The cells that the renderer gets, and where they are."
    for path in build_site.PROCESSED.rglob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf8"))["cells"]:
            if cell["cell_type"] == kind:
                yield path.name, "".join(cell["source"])


def test_options_of_cells_are_yaml_without_doubles(site):
    options, code = build_site.cell_options("#| code-fold: show\n#| fig-alt: A: b\n#| code-fold: true\nx = 1")
    assert (options, code) == ({"code-fold": "true", "fig-alt": '"A: b"'}, "x = 1")
    seen = set()
    for name, source in processed_cells(site, "code"):
        head = "".join(line[3:] + "\n" for line in source.split("\n") if line.startswith("#| "))
        keys = re.findall(r"^([\w-]+):", head, re.M)
        assert len(set(keys)) == len(keys) and set(yaml.safe_load(head) or {}) == set(keys), (name, head)
        seen |= set(keys)
    assert "code-fold" in seen


def test_images_alone_in_a_paragraph_have_alternative_texts(site):
    assert build_site.with_alternatives('A\n\n![Say "x"](a.svg)\n') == 'A\n\n![](a.svg){fig-alt="Say \\"x\\""}\n'
    assert build_site.with_alternatives("![A](a.svg)\n![B](b.svg)") == "![A](a.svg)\n![B](b.svg)"  # two in a paragraph are no figures
    paragraphs = [p.strip() for _, source in processed_cells(site, "markdown") for p in re.split(r"\n\s*\n", source)]
    alone = [p for p in paragraphs if re.fullmatch(r"!\[[^\]]*\]\([^)]*\)(\{[^}]*\})?", p)]
    assert alone and all("fig-alt=" in p for p in alone)


def test_options_are_where_quarto_reads_them():
    "In _quarto.yml; on its command line `-M` says the same of a page, where most do nothing."
    from smalldocs.quarto_keys import QUARTO_PAGE_OPTIONS

    html = CONFIG["format"]["html"]
    assert set(html) <= QUARTO_PAGE_OPTIONS
    assert html["respect-user-color-scheme"] is True and html["html-math-method"] == "katex"
    assert not set(CONFIG["website"]) & QUARTO_PAGE_OPTIONS - {"title", "description", "search", "repo-actions", "image", "comments"}
    assert '"-M"' not in (ROOT / "tools" / "build_site.py").read_text(encoding="utf8")


def test_the_navbar_has_colours_of_its_own():
    "Quarto marks it as dark whatever the page is, so Bootstrap's variables there are not the page's; and its logo needs a height."
    style = (ROOT / "nbs" / "styles.css").read_text(encoding="utf8")
    rules = re.findall(r"^[^@{}\n]*navbar[^{}\n]*\{([^}]*)\}", style, re.M)
    assert len(rules) > 5 and not any(re.search(r"var\(--bs-(?!font)", rule) for rule in rules)
    assert re.search(r"\.navbar-logo \{[^}]*(?<!-)height:", style) and CONFIG["website"]["navbar"]["background"] == "none"
    assert all(re.search(r"<svg[^>]*viewBox", p.read_text(encoding="utf8")) for p in (ROOT / "nbs" / "images").glob("*.svg"))
    assert re.search(r'<svg[^>]* width="\d+" height="\d+"', (ROOT / "nbs" / CONFIG["website"]["navbar"]["logo"]).read_text(encoding="utf8"))


@pytest.mark.parametrize("spelling", IMPORTS)
def test_remote_imports_of_any_spelling(tmp_path, spelling):
    "They are found, and taken out with nothing else."
    (tmp_path / "index.html").write_text(f"<style>{spelling}p {{}}</style>")
    (tmp_path / "a.css").write_text(f"{spelling}p {{}}")
    assert len(list(check_site.problems(tmp_path))) == 2
    assert build_site.finish_site.REMOTE_IMPORT.sub("", f'@import "b.css";{spelling}p {{}}') == '@import "b.css";p {}'


def test_quartos_pages_load_nothing_from_elsewhere_and_no_modules(tmp_path):
    "A page as Quarto writes it: with KaTeX and fonts from afar, and modules, which a browser refuses to a page in a folder."
    module = '<script src="site_libs/quarto-html/{}" type="module"></script>'
    scripts = module.format("quarto.js") + module.format("tabsets/tabsets.js")
    katex = '<script src="https://cdn.jsdelivr.net/npm/katex@0.15.1/dist/katex.min.js"></script>'
    files = {
        "index.html": f'<!DOCTYPE html><html><head>\n{scripts}{katex}</head><body><main id="quarto-document-content"></main></body></html>',
        "site_libs/a.css": f"{IMPORTS[0]}p {{}}",
        "site_libs/quarto-html/quarto.js": 'import * as tabsets from "./tabsets/tabsets.js";\nconst a = 1;\ntabsets.init();\n',
        "site_libs/quarto-html/tabsets/tabsets.js": "export function init() {}\n",
        "assets/site.js": "",
        "assets/katex/katex.min.js": "",
        "search.json": "[]",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    build_site.finish_site.finish(tmp_path, tmp_path / "notebooks")
    assert not list(check_site.problems(tmp_path))
    assert "module" not in (tmp_path / "index.html").read_text()
    assert not re.search(r"^(import|export) ", (tmp_path / "site_libs/quarto-html/quarto.js").read_text(), re.M)


def test_workflows_are_pinned_and_may_do_little():
    versions = set()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text(encoding="utf8")
        workflow = yaml.safe_load(text)
        assert workflow["permissions"] == {}
        for job in workflow["jobs"].values():
            steps = job.get("steps", [])
            writes = {name for name, right in job["permissions"].items() if right == "write"}
            assert not writes or "environment" in job and not any("run" in step or "checkout" in step.get("uses", "") for step in steps)
            assert all(step["with"]["persist-credentials"] is False for step in steps if "actions/checkout@" in step.get("uses", ""))
            versions |= {step["with"]["version"] for step in steps if "quarto-actions" in step.get("uses", "")}
        for action, comment in re.findall(r"uses: (?!\./)(\S+)(.*)", text):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) and re.fullmatch(r" # v\d+\.\d+\.\d+", comment), action
    assert len(versions) == 1 and re.fullmatch(r"\d+\.\d+\.\d+", versions.pop())
