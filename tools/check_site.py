"""Check the built site: every link, anchor, image and script exists, and nothing is fetched from elsewhere.

    python tools/check_site.py [_docs]
"""

import re
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser loads by itself; an <a href> is only followed by a person.
LOADED = {("img", "src"), ("script", "src"), ("source", "src"), ("iframe", "src"), ("link", "href")}
NOT_LOADED = {"canonical", "alternate", "prev", "next"}


class Page(HTMLParser):
    "The ids of a page, what it links to, and what it loads."

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads, self.images_without_alt = set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids |= {values[k] for k in ("id", "name") if values.get(k)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag == "img" and not values.get("alt"):
            self.images_without_alt.append(values.get("src", "")[:60])
        for name in ("src", "href"):
            if (tag, name) in LOADED and values.get(name) and values.get("rel") not in NOT_LOADED:
                self.loads.append(values[name])


def problems(site):
    "A line for everything that is wrong."
    config = ConfigParser()
    config.read(Path(__file__).resolve().parent.parent / "settings.ini")
    base = config["DEFAULT"]["doc_baseurl"] + "/"  # where the 404 page's links begin
    pages = {path: Page(path.read_text(encoding="utf8")) for path in site.rglob("*.html")}
    for path, page in pages.items():
        where = path.relative_to(site)
        for url in [*page.links, *page.loads]:
            parts = urlsplit(url)
            if parts.scheme in ("data", "mailto", "javascript"):
                continue
            if parts.scheme or parts.netloc:
                if url in page.loads:
                    yield f"{where} loads {url} from elsewhere"
                continue
            start, place = (site, parts.path.removeprefix(base)) if parts.path.startswith(base) else (path.parent, parts.path)
            target = (start / unquote(place)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                yield f"{where} links to {url}, which does not exist"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                yield f"{where} links to {url}, but there is no such place on that page"
        for image in page.images_without_alt:
            yield f"{where} shows {image} without alternative text"
    for sheet in site.rglob("*.css"):
        for url in re.findall(r"url\([\"']?((?:https?:)?//[^)\"']+)", sheet.read_text(encoding="utf8")):
            yield f"{sheet.relative_to(site)} loads {url} from elsewhere"


if __name__ == "__main__":
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "_docs").resolve()
    if not (site / "index.html").exists():
        sys.exit(f"There is no site in {site.name}. Build it first: make docs")
    found = sorted(set(problems(site)))
    print("\n".join(found))
    print(f"→ {len(list(site.rglob('*.html')))} pages checked, {len(found)} problems")
    sys.exit(bool(found))
