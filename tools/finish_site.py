"""What the site has besides its pages, whoever rendered them: ways to open the notebooks, a search that knows the public names, cards
for links, a feed, a list for language models, and a page for addresses that do not exist."""

import ast
import base64
import functools
import html
import io
import json
import re
import shutil
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import oxipng
import resvg_py
import tinycss2
import yaml
from fontTools import subset
from markdown_it import MarkdownIt
from nbdev.config import get_config
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
INK, ACCENT, SOFT, MUTED = "#1d3557", "#1a659e", "#eef4fa", "#4a5866"


@dataclass(eq=False)
class Page:
    "A page as its source describes it."

    path: str  # below the site, such as "layers/dense.html"
    title: str
    summary: str
    notebook: object = None  # the processed notebook; None for pages that are Markdown

    @property
    def up(self):
        return "../" * self.path.count("/")


def address():
    config = get_config()
    return (config.doc_host + config.doc_baseurl).rstrip("/") + "/"


def inventory(processed):
    "Every page, in the order of the sidebar, by its path; and the sections of the sidebar with the paths in them."
    pages = {}
    for source in [*processed.rglob("*.ipynb"), *processed.glob("*.md")]:
        notebook = nbformat.read(source, 4) if source.suffix == ".ipynb" else None
        text = notebook.cells[0].source if notebook else source.read_text(encoding="utf8")
        front = yaml.safe_load(re.match(r"---\n(.*?)\n---", text, re.S)[1])
        path = source.relative_to(processed).with_suffix(".html").as_posix()
        pages[path] = Page(path, plain(front["title"]), plain(front.get("description", "")), notebook)
    sections, loose = {}, []
    for entry in yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf8"))["website"]["sidebar"]["contents"]:
        paths = [re.sub(r"\.\w+$", ".html", e["href"]) for e in entry.get("contents", [entry])]
        if "section" in entry:
            sections[entry["section"]] = paths
        else:
            loose += paths
    order = [*loose, *(p for paths in sections.values() for p in paths)]
    return {p: pages[p] for p in sorted(pages, key=lambda p: (order.index(p) if p in order else len(order), p))}, sections


def plain(text):
    "Without Markdown's marks."
    return re.sub(r"[`*]", "", re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)).strip()


# ---- public names


@functools.cache
def public_names():
    "Every public name: its module, its place on the site, its line in the source, and the first line of its docstring."
    scope, found = {}, []
    exec((ROOT / "keras_mml" / "_modidx.py").read_text(encoding="utf8"), scope)
    for module, symbols in scope["d"]["syms"].items():
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf8"))
        exported = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
        nodes = {n.name: n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        for name in exported:
            if name in nodes:
                summary = plain((ast.get_docstring(nodes[name]) or "").split("\n")[0])
                found.append({"name": name, "module": module, "href": symbols[f"{module}.{name}"][0], "line": nodes[name].lineno, "summary": summary})
    return found


def place(dotted):
    "Where `DenseMML`, `keras_mml.DenseMML` or `keras_mml.layers.dense.DenseMML` is documented; None if that is not clear, or nowhere."
    module, _, name = dotted.rpartition(".")
    places = {n["href"] for n in public_names() if n["name"] == name and (n["module"] + ".").startswith(module + "." if module else "")}
    return places.pop() if len(places) == 1 else None


def with_links(markdown, up):
    "Names in backticks with their modules lead to their sections, as nbdev does it with bare names; but a layer's `call` is not a kernel's."
    markdown = re.sub(r"\[(`call`)\]\([^)]*\)", r"\1", markdown)
    markdown = re.sub(r"\[\[(`[^`]+`)\]\([^)]*\)\]\(", r"[\1](", markdown)  # a name that is the text of a link already
    link = lambda m: f"[{m[0]}]({up}{place(m[1])})" if place(m[1]) else m[0]
    fences = re.split(r"(^```.*?^```|^#+ [^\n]*$)", markdown, flags=re.S | re.M)
    return "".join(re.sub(r"(?<![\[`])`(keras_mml(?:\.\w+)+)`(?![\]`])", link, part) if not part.startswith(("```", "#")) else part for part in fences)


def with_source(markdown, path):
    "The source of what is documented here, also where another module has the same name."
    config = get_config()
    here = {n["name"]: n for n in public_names() if n["href"].startswith(path + "#")}

    def source(match):
        name = here.get(match[2])
        if name is None:
            return match[0]
        file = name["module"].replace(".", "/") + ".py"
        return f"[source]({config.git_url}/blob/{config.branch}/{file}#L{name['line']}){match[1]}{match[2]}\n"

    return re.sub(r"\[source\]\([^)]*\)(\{[^}]*\}\s*#+ )(\w+)\n", source, markdown)


def write_search(site, pages):
    """Public names come first in what both searches read, Quarto's and smalldocs'; assets/site.js ranks what they find.
    The index is a script, see there, too."""
    texts = {}
    for entry in json.loads((site / "search.json").read_text(encoding="utf8")):
        path, _, anchor = entry["href"].partition("#")
        summary = "" if anchor or path not in pages else pages[path].summary + " "
        texts.setdefault(entry["href"], {**entry, "text": findable(summary + entry["text"])})
    entries = []
    for n in sorted(public_names(), key=lambda n: (len(n["name"]), n["name"])):
        section = texts.pop(n["href"], {"text": ""})
        entries.append({"href": n["href"], "title": n["name"], "section": f"{n['module']}.{n['name']}", "text": f"{n['summary']} {section['text']}"})
    entries += [{key: entry[key] for key in ("href", "title", "section", "text")} for href, entry in texts.items() if not href.startswith("404")]
    (site / "search.json").unlink()
    (site / "assets" / "search.js").write_text(f"window.searchIndex = {json.dumps(entries, ensure_ascii=False)};\n", encoding="utf8")


def findable(text, shown=300):
    "The start of a text, of which results show a piece, and every longer word of the rest once."
    text = " ".join(text.split())
    words = dict.fromkeys(re.findall(r"[A-Za-z]{4,}", text[shown:]))
    seen = set(re.findall(r"[A-Za-z]{4,}", text[:shown]))
    return " ".join([text[:shown], *(word for word in words if word not in seen)])


# ---- pages


def smaller_plot(data):
    "A plot without metadata and with coordinates to a hundredth of a point."
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<\?xml.*?\?>\s*|<!DOCTYPE.*?>\s*|<!--.*?-->\s*", "", data["image/svg+xml"], flags=re.S)
    attribute = r"\b(?:d|points|x|y|x1|x2|y1|y2|width|height|viewBox)=\"[^\"]*\"|translate\([^)]*\)"
    svg = re.sub(attribute, lambda a: re.sub(r"-?\d+\.\d{3,}", lambda n: f"{float(n[0]):.2f}", re.sub(r"\s+", " ", a[0])), svg)
    svg = re.sub(r">\s+<", "><", svg.strip())
    return {**data, "image/svg+xml": svg}


def picture(image):
    "An image as WebP, in few colours: about half of the bytes."
    content = io.BytesIO()
    image.convert("RGB").quantize(32, dither=Image.Dither.NONE).convert("RGB").save(content, "WEBP", lossless=True, method=6)
    return content.getvalue()


def figures_as_files(text, page, site):
    "Plots become images beside the page, as Quarto has them: their ids do not meet, and pages show before their plots."
    folder = site / (page.path.removesuffix(".html") + "_files")
    count = 0

    def image(match):
        nonlocal count
        count += 1
        folder.mkdir(exist_ok=True)
        alt = re.match(r"<\w+ alt=(\"[^\"]*\")", match[0])
        if match["png"]:
            shown = Image.open(io.BytesIO(base64.b64decode(match["png"])))
            file, content = folder / f"figure-{count}.webp", picture(shown)
            width, height = (side // 2 for side in shown.size)
        else:
            svg = re.sub(r"^<svg alt=\"[^\"]*\"", "<svg", match[0])
            many_strokes = len(svg) > 20_000  # as pixels, more of them than a common screen shows, it is smaller
            file, content = folder / f"figure-{count}.{'webp' if many_strokes else 'svg'}", picture(raster(svg, zoom=1.5)) if many_strokes else svg.encode()
            width, height = (round(float(re.search(rf'^<svg[^>]*? {side}="([\d.]+)pt"', svg)[1]) * 4 / 3) for side in ("width", "height"))
        file.write_bytes(content)
        kind = "figure-img wide" if width > 700 else "figure-img"  # wide ones scroll on a phone
        return f'<img src="{folder.name}/{file.name}" alt={alt[1] if alt else chr(34) * 2} width="{width}" height="{height}" loading="lazy" class="{kind}">'

    return re.sub(r"<svg(?: alt=\"[^\"]*\")? xmlns:xlink=.*?</svg>|<img [^>]*src=\"data:image/png;base64,(?P<png>[^\"]*)\"[^>]*>", image, text, flags=re.S)


def fewer_spans(code):
    "Highlighted code where numbers, operators and other small words have the colour of the text, and a string is one piece: a fifth of the page less."
    code = re.sub(r'<span class="(?:op|dv|fl|va|cn|bu|sc|bn|at)">([^<]*)</span>', r"\1", code[0])
    again = None
    while again != code:
        again, code = code, re.sub(r'(<span class="(\w+)">[^<]*)</span><span class="\2">', r"\1", code)
    return code.replace("&quot;", '"').replace("&#x27;", "'")


LEAF = re.compile(r'<li class="sidebar-item"><div class="sidebar-item-container">(<a [^>]*)class="sidebar-item-text (sidebar-link[^"]*)"([^>]*)><span class="menu-text">([^<]*)</span></a></div></li>')


def notebook_links(page):
    "Run it, or take it along."
    config = get_config()
    source = page.path.removesuffix(".html") + ".ipynb"
    colab = f"https://colab.research.google.com/github/{config.user}/{config.repo}/blob/{config.branch}/nbs/{source}"
    return (
        f'<p class="notebook-links"><a href="{colab}"><i class="bi bi-play-circle" aria-hidden="true"></i> Open in Colab</a> '
        f'<a href="{Path(source).name}" download><i class="bi bi-download" aria-hidden="true"></i> Download notebook</a></p>'
    )


def head(page):
    "What links to the page show, and where its neighbours are."
    url, title = address(), "keras_mml" if page.path == "index.html" else page.title
    tags = [("property", "og:type", "website"), ("property", "og:site_name", "keras_mml"), ("property", "og:title", title)]
    tags += [("property", "og:description", page.summary), ("property", "og:url", url + page.path)]
    tags += [("property", "og:image", url + card_path(page)), ("property", "og:image:width", "800"), ("property", "og:image:height", "420")]
    tags += [("property", "og:image:alt", f"{title}: {page.summary}"), ("name", "twitter:card", "summary_large_image"), ("name", "description", page.summary)]
    lines = [f'<meta {kind}="{name}" content="{html.escape(value)}">' for kind, name, value in tags]
    lines.append(f'<link rel="canonical" href="{url}{page.path}">')
    lines.append(f'<link rel="alternate" type="application/atom+xml" title="Changelog" href="{page.up}changelog.xml">')
    return "\n".join(lines)


ICON_WITH_ROLE = re.compile(r'(<i class="bi[^"]*") role="img">')


def finish_page(site, page):
    path = site / page.path
    text = path.read_text(encoding="utf8")
    text = re.sub(r'<meta (?:property|name)="(?:og:|twitter:|description)[^>]*>\s*', "", text)
    text = re.sub(r'<link [^>]*rel="canonical"[^>]*>\s*', "", text)
    assets = urlsplit(address()).path if page.path == "404.html" else page.up
    text = re.sub(r"<script\b", f'<script src="{assets}assets/site.js" defer></script>\\g<0>', text, count=1)  # runs before what it prepares for
    text = text.replace("</head>", head(page) + "</head>", 1)
    text = re.sub(r"<body[^>]*>", r'\g<0><a class="skip-link" href="#quarto-document-content">Skip to the text</a>', text, count=1)
    text = text.replace("/nbs/changelog.md", "/CHANGELOG.md").replace("/nbs/404.md", "/tools/finish_site.py")  # which they are made from
    text = ICON_WITH_ROLE.sub(r'\1 aria-hidden="true">', text)
    text = figures_as_files(text, page, site)
    text = re.sub(r'(?<=<code class="sourceCode python">).*?(?=</code>)', fewer_spans, text, flags=re.S)
    text = LEAF.sub(r'<li class="sidebar-item">\1class="\2"\3>\4</a></li>', text)  # fifty of them on fifty pages
    text = re.sub(r'<button title="Copy to Clipboard"[^>]*>.*?</button>', "", text)  # site.js adds them
    if page.notebook is not None:
        title = text.index('id="title-block-header"')
        end = text.index("</header>", title)
        text = text[:end] + notebook_links(page) + text[end:]
    if page.path == "404.html":  # served for any address, so its own links begin at the site's
        base = urlsplit(address()).path
        text = re.sub(r'\b(href|src|content)="(?=(?:\./)?[\w-]+(?:[/.#"]))(?!https?:|data:)(?:\./)?(?=[^"]*(?:\.(?:html|css|js|svg|xml)\b))', rf'\1="{base}', text)
        text = re.sub(r'(<meta name="(?:smalldocs|quarto):offset" content=")\./', rf"\g<1>{base}", text)
    path.write_text(text, encoding="utf8")


# ---- cards


def card_path(page):
    "Of a page with a plot; the others have the home page's."
    return "cards/" + (page.path.removesuffix(".html").replace("/", "-") if first_plot(page) else "index") + ".png"


def font(size, weight):
    inter = ImageFont.truetype(ROOT / "nbs" / "assets" / "fonts" / "inter.woff2", size)
    inter.set_variation_by_axes([weight])
    return inter


def raster(svg, **size):
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", dpi=96, skip_system_fonts=True, **size)))).convert("RGB")


@functools.cache
def first_plot(page):
    for cell in page.notebook.cells if page.notebook else []:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/svg+xml" in data:
                return raster(data["image/svg+xml"], zoom=2)
            if "image/png" in data:
                return Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")


def write_card(site, page):
    "The picture that a link to the page shows where people talk: title, summary, and the page's first plot, or, on the home page, the logo."
    card = Image.new("RGB", (1200, 630), "white")
    draw = ImageDraw.Draw(card)
    logo = (ROOT / "nbs" / "images" / "logo.svg").read_text(encoding="utf8")
    picture = first_plot(page) or raster(logo, width=300)
    y, lines = 84, textwrap.wrap(page.title, 18)
    for line in lines:
        draw.text((72, y), line, INK, font(60, 760))
        y += 70
    y += 18
    for line in textwrap.wrap(page.summary, 37)[: 8 - len(lines)]:
        draw.text((72, y), line, MUTED, font(30, 400))
        y += 43
    picture.thumbnail((490, 430), Image.LANCZOS)
    card.paste(picture, (1200 - 60 - picture.width, (540 - picture.height) // 2))
    draw.rectangle((0, 540, 1200, 630), SOFT)
    card.paste(raster(logo, width=54), (72, 558))
    draw.text((144, 567), "keras_mml", INK, font(30, 700))
    draw.text((316, 571), "matmul-free layers for Keras 3", MUTED, font(26, 400))
    target = site / card_path(page)
    target.parent.mkdir(exist_ok=True)
    card = card.resize((800, 420), Image.LANCZOS)
    card.quantize(64, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(target)
    oxipng.optimize(target, level=4)


# ---- for machines


def write_llms(site, pages, sections):
    "llms.txt (https://llmstxt.org): what there is, in the order in which to read it."
    config, home = get_config(), pages["index.html"]
    listed = {p for paths in sections.values() for p in paths}
    rest = [p for p in pages if p not in listed]
    lines = [f"# {config.title}", "", f"> {home.summary}", ""]
    for section, paths in {"Start": ["index.html"], **sections, "Optional": [p for p in rest if p != "index.html"]}.items():
        lines += [f"## {section}", ""]
        lines += [f"- [{pages[p].title}]({address()}{p}): {pages[p].summary}" for p in paths if p in pages]
        lines.append("")
    (site / "llms.txt").write_text("\n".join(lines), encoding="utf8")


def releases():
    "The sections of CHANGELOG.md: version, date or None, Markdown."
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf8")
    for match in re.finditer(r"^## (\S+?), (\S+)\n(.*?)(?=^## |\Z)", text, re.S | re.M):
        yield match[1], None if match[2] == "unreleased" else match[2], match[3].strip()


def write_feed(site):
    "An Atom feed with an entry for each version; what is not released yet has the date of its last change."
    changed = subprocess.run(["git", "log", "-1", "--format=%cI", "CHANGELOG.md"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    entries, dates = [], []
    for version, date, notes in releases():
        dates.append(f"{date}T00:00:00Z" if date else changed or "1970-01-01T00:00:00Z")
        link = f"{address()}changelog.html#v{version}"
        title = f"keras_mml {version}" + ("" if date else ", not released yet")
        body = html.escape(MarkdownIt().render(notes))
        entries.append(
            f'<entry><title>{title}</title><id>{link}</id><link href="{link}"/><updated>{dates[-1]}</updated>'
            f'<content type="html">{body}</content></entry>'
        )
    (site / "changelog.xml").write_text(
        '<?xml version="1.0" encoding="utf-8"?>\n<feed xmlns="http://www.w3.org/2005/Atom">'
        f'<title>keras_mml: changelog</title><id>{address()}changelog.xml</id><link rel="self" href="{address()}changelog.xml"/>'
        f'<link href="{address()}"/><updated>{max(dates)}</updated><author><name>{get_config().author}</name></author>\n'
        + "\n".join(entries) + "\n</feed>\n",
        encoding="utf8",
    )  # fmt: skip


# ---- pages that are not notebooks, written before the site is rendered

MISSING = """---
title: This page does not exist
description: It may have moved, or the address has a typo
search: false
page-navigation: false
---

The search above knows every page and every public name. Or begin at one of these:

- [the home page](index.ipynb): what `keras_mml` is, and a first model in ten lines
- [the first tutorial](tutorials/mnist.ipynb)
- [the layers](layers/index.ipynb), and [`DenseMML`](layers/dense.ipynb) before all others
- [the changelog](changelog.md)
"""


def write_sources(processed, linkify):
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf8").split("\n", 1)[1]
    front = "---\ntitle: Changelog\ndescription: What changed, version by version\n---\n"
    text = re.sub(r"^## (\S+), .*$", r"\g<0> {#v\1}", linkify(text), flags=re.M)
    (processed / "changelog.md").write_text(front + text, encoding="utf8")
    (processed / "404.md").write_text(MISSING, encoding="utf8")


def trim(site):
    "Without what nobody loads: icons, older fonts and style rules that no page or script of the site uses."
    for old in site.rglob("bootstrap-icons.woff"):
        if old.with_suffix(".woff2").exists():
            old.unlink()
    words = set()
    for path in [*site.rglob("*.html"), *site.rglob("*.js")]:
        words |= set(re.findall(r"[\w-]+", path.read_text(encoding="utf8")))
    for sheet in [*site.rglob("bootstrap*.css"), *site.rglob("themes/*.css"), *site.rglob("katex*.css")]:
        rules = tinycss2.parse_stylesheet(sheet.read_text(encoding="utf8"), skip_comments=True, skip_whitespace=True)
        sheet.write_text(tinycss2.serialize(used(rules, words)), encoding="utf8")
    rules = "".join(p.read_text(encoding="utf8") for p in site.rglob("*.css"))
    icons = [*re.findall("[\ue000-\uf8ff]", rules), *(chr(int(code, 16)) for code in re.findall(r"\\(f[0-9a-f]{3})\b", rules))]
    for font in site.rglob("bootstrap-icons.woff*"):  # two thousand icons, of which the site shows some
        subset.main([str(font), f"--text={''.join(icons)}", f"--flavor={font.suffix[1:]}", f"--output-file={font}"])
    sitemap = site / "sitemap.xml"
    sitemap.write_text(re.sub(r"\s*<url>\s*<loc>[^<]*/404\.html</loc>.*?</url>", "", sitemap.read_text(encoding="utf8"), flags=re.S), encoding="utf8")


def used(rules, words):
    "The rules with a selector whose classes all occur somewhere."
    kept = []
    for rule in rules:
        if rule.type == "qualified-rule":
            selectors = re.sub(r"\[[^]]*\]|:not\([^)]*\)", "", tinycss2.serialize(rule.prelude)).split(",")
            if not any(set(re.findall(r"\.(-?[A-Za-z_][\w-]*)", s)) <= words for s in selectors):
                continue
        elif rule.type == "at-rule" and rule.lower_at_keyword == "media":
            rule.content = used(tinycss2.parse_rule_list(rule.content, skip_comments=True, skip_whitespace=True), words)
            if not rule.content:
                continue
        kept.append(rule)
    return kept


def finish(site, processed, notebooks):
    pages, sections = inventory(processed)
    for page in pages.values():
        if page.notebook is not None:
            source = Path(page.path).with_suffix(".ipynb")
            shutil.copy(notebooks / source, site / source)
        finish_page(site, page)
        if first_plot(page) or page.path == "index.html":
            write_card(site, page)
    write_search(site, pages)
    write_llms(site, {p: v for p, v in pages.items() if p != "404.html"}, sections)
    write_feed(site)
    trim(site)
