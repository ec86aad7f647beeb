"""What the site has besides its pages: links to public names, pictures, a search that knows them, a feed; nothing from elsewhere."""

import ast
import functools
import html
import io
import json
import re
import shutil
import subprocess
import textwrap
from pathlib import Path
from urllib.parse import urlsplit

import matplotlib
import resvg_py
from markdown_it import MarkdownIt
from nbdev.config import get_config
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
CONFIG = get_config(path=ROOT)
KATEX_CDN = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[^/\"']*/dist(/contrib)?/")
SCRIPTS = r'<script[^>]* src="(?:https?://[^>]*|[^"]*tabsets\.js" type="module")></script>|<script[^>]*>\s*define\(.jquery.*?</script>'
REMOTE_IMPORT = re.compile(r"""@import\s*(?=(?:url\(\s*)?["']?(?:https?:)?//)(?:url\([^)]*\)|"[^"]*"|'[^']*')[^;]*;""", re.I)  # fonts


def address():
    return (CONFIG.doc_host + CONFIG.doc_baseurl).rstrip("/") + "/"


@functools.cache
def public_names():
    "Every public name: its module, its place on the site, its line in the source, and the first line of its docstring."
    scope, found = {}, []
    exec((ROOT / "keras_mml" / "_modidx.py").read_text(encoding="utf8"), scope)
    for module, symbols in scope["d"]["syms"].items():
        file = module.replace(".", "/") + ".py"
        tree = ast.parse((ROOT / file).read_text(encoding="utf8"))
        exported = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in exported:
                summary = re.sub(r"\[([^\]]+)\]\([^)]*\)|[`*]", r"\1", (ast.get_docstring(node) or "").split("\n")[0])
                href = symbols[f"{module}.{node.name}"][0]
                found.append({"name": node.name, "module": module, "href": href, "source": f"{file}#L{node.lineno}", "summary": summary})
    return found


def place(dotted):
    "Where `DenseMML`, `keras_mml.DenseMML` or `keras_mml.layers.dense.DenseMML` is documented; None if that is not clear, or nowhere."
    module, _, name = dotted.rpartition(".")
    places = {n["href"] for n in public_names() if n["name"] == name and (n["module"] + ".").startswith(module + "." if module else "")}
    return places.pop() if len(places) == 1 else None


def with_links(markdown, up):
    "Names in backticks with their modules lead to their sections, as bare names do with nbdev; but a layer's `call` is no kernel's."
    markdown = re.sub(r"\[(`call`)\]\([^)]*\)", r"\1", markdown)
    markdown = re.sub(r"\[\[(`[^`]+`)\]\([^)]*\)\]\(", r"[\1](", markdown)  # a name that is the text of a link already
    link = lambda m: f"[{m[0]}]({up}{place(m[1])})" if place(m[1]) else m[0]
    fences = re.split(r"(^```.*?^```|^#+ [^\n]*$)", markdown, flags=re.S | re.M)
    bare = re.compile(r"(?<![\[`])`(keras_mml(?:\.\w+)+)`(?![\]`])")
    return "".join(part if part.startswith(("```", "#")) else bare.sub(link, part) for part in fences)


def with_source(markdown, page):
    "The source of what is documented here, also where another module has the same name."
    files = f"{CONFIG.git_url}/blob/{CONFIG.branch}"
    here = {n["name"]: f"[source]({files}/{n['source']})" for n in public_names() if n["href"].startswith(f"{page}#")}
    return re.sub(r"(\[source\]\([^)]*\))(\{[^}]*\}\s*#+ )(\w+)\n", lambda m: f"{here.get(m[3], m[1])}{m[2]}{m[3]}\n", markdown)


FONTS = [str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSansMono{kind}.ttf")) for kind in ("", "-Bold")]


def raster(svg, **size):
    fonts = dict(font_files=FONTS, monospace_family="DejaVu Sans Mono", skip_system_fonts=True)  # the same on all machines
    content = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", dpi=96, **fonts, **size)
    return Image.open(io.BytesIO(bytes(content))).convert("RGB")


def save(image, target):
    target.parent.mkdir(exist_ok=True)
    image.quantize(64, dither=Image.Dither.NONE).save(target, optimize=True, lossless=True, method=2)


def write_card(target, title, summary, plot=None):
    "The picture that a link to the page shows where people talk: title, summary, and the page's first plot or, without one, the logo."
    card, logo = Image.new("RGB", (800, 420), "white"), (ROOT / "nbs" / "images" / "logo.svg").read_text(encoding="utf8")
    draw, inter = ImageDraw.Draw(card), ROOT / "nbs" / "assets" / "fonts" / "inter.woff2"

    def write(x, y, text, colour, size, weight):
        font = ImageFont.truetype(inter, size)
        font.set_variation_by_axes([weight])
        draw.multiline_text((x, y), text, colour, font)
        return draw.multiline_textbbox((x, y), text, font)[3]

    bottom = write(48, 54, textwrap.fill(title, 18), "#1d3557", 40, 760)
    write(48, bottom + 22, textwrap.fill(summary, 37, max_lines=7), "#4a5866", 20, 400)
    shown = plot.copy() if plot else raster(logo, width=200)
    shown.thumbnail((326, 286))
    card.paste(shown, (760 - shown.width, (360 - shown.height) // 2))
    draw.rectangle((0, 360, 800, 420), "#eef4fa")
    card.paste(raster(logo, width=36), (48, 372))
    write(96, 378, "keras_mml", "#1d3557", 20, 700)
    write(211, 380, "matmul-free layers for Keras 3", "#4a5866", 17, 400)
    save(card, target)


def write_search(site):
    "Public names come first, shorter ones before longer ones, for assets/site.js to rank. A script: pages in a folder fetch nothing else."
    entries = json.loads((site / "search.json").read_text(encoding="utf8"))
    entries = {entry["href"]: entry for entry in entries if not entry["href"].startswith("404")}
    found = []
    for name in sorted(public_names(), key=lambda name: len(name["name"])):
        entry = entries.pop(name["href"], {"text": ""})
        named = {"objectID": name["href"], "href": name["href"], "title": name["name"], "section": f"{name['module']}.{name['name']}"}
        found.append({**entry, **named, "text": f"{name['summary']} {entry['text']}"})
    found += [{**entry, "objectID": href} for href, entry in entries.items()]
    (site / "assets" / "search.js").write_text(f"window.searchIndex = {json.dumps(found, ensure_ascii=False)};\n", encoding="utf8")
    (site / "search.json").unlink()


def write_feed(site):
    "An Atom feed with an entry for each version; what is not released yet has the date of its last change."
    changed = subprocess.run(["git", "log", "-1", "--format=%cI", "CHANGELOG.md"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    link = lambda place: f'<id>{address()}{place}</id><link href="{address()}{place}"/>'
    head = lambda title, place, date: f"<title>{title}</title>{link(place)}<updated>{date}</updated>"
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf8")
    entries, dates = "", []
    for version, date, notes in re.findall(r"^## (\S+?), (\S+)\n(.*?)(?=^## |\Z)", changelog, re.S | re.M):
        waits = date == "unreleased"
        dates.append((changed or "1970-01-01T00:00:00Z") if waits else f"{date}T00:00:00Z")
        title = f"keras_mml {version}{', not released yet' if waits else ''}"
        content = html.escape(MarkdownIt().render(notes))
        entries += f'<entry>{head(title, f"changelog.html#v{version}", dates[-1])}<content type="html">{content}</content></entry>\n'
    author = f"<author><name>{CONFIG.author}</name></author>"
    begin = '<?xml version="1.0" encoding="utf-8"?>\n<feed xmlns="http://www.w3.org/2005/Atom">'
    feed = head("keras_mml: changelog", "changelog.xml", max(dates))
    (site / "changelog.xml").write_text(f"{begin}{feed}{author}\n{entries}</feed>\n", encoding="utf8")


def notebook_links(source):
    "Run it, or take it along."
    colab = f"https://colab.research.google.com/github/{CONFIG.user}/{CONFIG.repo}/blob/{CONFIG.branch}/nbs/{source.as_posix()}"
    links = ((f'href="{colab}"', "play-circle", "Open in Colab"), (f'href="{source.name}" download', "download", "Download notebook"))
    shown = " ".join(f'<a {a}><i class="bi bi-{icon}" aria-hidden="true"></i> {text}</a>' for a, icon, text in links)
    return f'<p class="notebook-links">{shown}</p>'


def finish(site, notebooks):
    "Nothing is fetched from elsewhere: KaTeX and fonts are the site's own. And notebooks lie beside their pages."
    for path in site.rglob("*.html"):
        page, text = path.relative_to(site), path.read_text(encoding="utf8")
        up = "../" * (len(page.parts) - 1)
        text = re.sub(SCRIPTS, "", KATEX_CDN.sub(f"{up}assets/katex/", text), flags=re.S)  # those for widgets, and modules
        text = text.replace('quarto.js" type="module"', 'quarto.js" defer')
        text = re.sub(r"<body[^>]*>", r'\g<0><a class="skip-link" href="#quarto-document-content">Skip to the text</a>', text, count=1)
        begin = f'<script src="{up}assets/site.js" defer></script>'  # before what it prepares for
        if page.name == "404.html":  # served for any address, so its own links begin at the site's
            begin, text = f'<base href="{urlsplit(address()).path}">{begin}', text.replace('href="#', 'href="404.html#')
        text = re.sub(r"<head[^>]*>", rf"\g<0>{begin}", text, count=1)
        source = page.with_suffix(".ipynb")
        if (notebooks / source).exists():
            shutil.copy(notebooks / source, site / source)
            title = text.index("</header>", text.index('id="title-block-header"'))
            text = text[:title] + notebook_links(source) + text[title:]
        path.write_text(text, encoding="utf8")
    for sheet in site.rglob("*.css"):
        sheet.write_text(REMOTE_IMPORT.sub("", sheet.read_text(encoding="utf8")), encoding="utf8")
    for script in site.glob("site_libs/quarto-html/quarto.js"):  # a module, which pages in a folder may not load, becomes a common script
        tabs = (script.parent / "tabsets" / "tabsets.js").read_text(encoding="utf8").replace("export ", "")
        text = re.sub(r"^import .*\n", "", script.read_text(encoding="utf8"), flags=re.M)
        script.write_text(f"{{\n{tabs}\nconst tabsets = {{init}};\n{text}\n}}\n", encoding="utf8")
    write_search(site)
    write_feed(site)
