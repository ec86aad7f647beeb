"""Check the built site: every link, anchor, image and script exists, and nothing is fetched from elsewhere: tools/check_site.py [_docs]"""

import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup
from nbdev.config import get_config

BASE = get_config(path=Path(__file__).resolve().parent.parent).doc_baseurl + "/"  # where links of the 404 page may begin
LOADED = "[src], link[href]:not([rel~=canonical], [rel~=alternate], [rel~=prev], [rel~=next])"  # what a browser loads by itself
REMOTE = re.compile(r"(?:@import\s*|url\(\s*)[\"']?((?:https?:)?//[^\s)\"';]+)", re.I)  # in a style sheet, with or without url() and quotes


def problems(site):
    "A line for everything that is wrong."
    pages = {path: BeautifulSoup(path.read_text(encoding="utf8"), "html.parser") for path in site.rglob("*.html")}
    ids = {path: {tag.get(name) for tag in page.select("[id], [name]") for name in ("id", "name")} for path, page in pages.items()}
    for path, page in pages.items():
        where = path.relative_to(site)
        yield from (f"{where} shows {str(image)[:60]} without alternative text" for image in page.select("img:not([alt]), img[alt='']"))
        loads = [tag.get("src") or tag["href"] for tag in page.select(LOADED)]
        remote = [*REMOTE.findall(str(page)), *(url for url in loads if re.match(r"(https?:)?//", url))]
        yield from (f"{where} loads {url} from elsewhere" for url in remote)
        for url in [*loads, *(tag["href"] for tag in page.select("a[href]"))]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc or not url:
                continue
            start, place = (site, parts.path.removeprefix(BASE)) if parts.path.startswith(BASE) else (path.parent, parts.path)
            target = (start / unquote(place)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                yield f"{where} links to {url}, which does not exist"
            elif parts.fragment and target in ids and unquote(parts.fragment) not in ids[target]:
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
