"""Check the built site: every link, anchor, image and script exists, and nothing is fetched from elsewhere: tools/check_site.py [_docs]"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from nbdev.config import get_config

BASE = get_config(path=Path(__file__).resolve().parent.parent).doc_baseurl + "/"  # where links of the 404 page may begin
NOT_LOADED = {"canonical", "alternate", "prev", "next"}  # a browser loads other <link>s by itself, and whatever has a src
REMOTE = re.compile(r"(?:@import\s*|url\(\s*)[\"']?((?:https?:)?//[^\s)\"';]+)", re.I)  # in a style sheet, with or without url() and quotes


class Page(HTMLParser):
    "The ids of a page, what it links to, what it loads, and its images without a description."

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads, self.bare = set(), [], REMOTE.findall(text), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids |= {values.get("id"), values.get("name")}
        loaded = values.get("src") or (tag == "link" and values.get("rel") not in NOT_LOADED and values.get("href"))
        self.loads += [loaded] if loaded else []
        self.links += [values["href"]] if tag == "a" and values.get("href") else []
        self.bare += [values.get("src", "")[:60]] if tag == "img" and not values.get("alt") else []


def problems(site):
    "A line for everything that is wrong."
    pages = {path: Page(path.read_text(encoding="utf8")) for path in site.rglob("*.html")}
    for path, page in pages.items():
        where = path.relative_to(site)
        yield from (f"{where} shows {image} without alternative text" for image in page.bare)
        yield from (f"{where} loads {url} from elsewhere" for url in page.loads if re.match(r"(https?:)?//", url))
        for url in [*page.links, *page.loads]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            start, place = (site, parts.path.removeprefix(BASE)) if parts.path.startswith(BASE) else (path.parent, parts.path)
            target = (start / unquote(place)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                yield f"{where} links to {url}, which does not exist"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                yield f"{where} links to {url}, but there is no such place on that page"
    for sheet in site.rglob("*.css"):
        yield from (f"{sheet.relative_to(site)} loads {url} from elsewhere" for url in REMOTE.findall(sheet.read_text(encoding="utf8")))


if __name__ == "__main__":
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "_docs").resolve()
    if not (site / "index.html").exists():
        sys.exit(f"There is no site in {site.name}. Build it first: make site")
    found = sorted(set(problems(site)))
    print("\n".join([*found, f"→ {len(list(site.rglob('*.html')))} pages checked, {len(found)} problems"]))
    sys.exit(bool(found))
