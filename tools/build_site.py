"""Build the website into _docs: nbdev prepares the notebooks, Quarto renders them, or smalldocs where Quarto is missing.

    python tools/build_site.py            from the notebooks executed into _build/nbs
    python tools/build_site.py --saved    from the outputs that are saved in nbs/
                                          (with --if-changed: unless _docs already is that)
    python tools/build_site.py --readme   only README.md, from nbs/index.ipynb
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import demo
import nbformat
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, _build_modidx
from nbdev.serve import proc_nbs

import finish_site

ROOT = Path(__file__).resolve().parent.parent
SOURCE, STAGED, PROCESSED, SITE = ROOT / "nbs", ROOT / "_build" / "staged", ROOT / "_proc", ROOT / "_docs"
REMOTE_SCRIPT = re.compile(r"<script[^>]* src=\"https?://[^>]*></script>|<script[^>]*>\s*define\('jquery'.*?</script>", re.S)
ITEMS = ("Args", "Call arguments", "Raises")  # the sections of docstrings that are lists
KATEX_CDN = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[^/\"']*/dist(/contrib)?/")


def fingerprint():
    "Of everything the site is made from."
    files = [p for top in (SOURCE, ROOT / "keras_mml", ROOT / "tools") for p in sorted(top.rglob("*")) if p.is_file()]
    files = [p for p in files if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts) and p.suffix != ".tmp"]
    digest = hashlib.sha256()
    for path in [*files, ROOT / "_quarto.yml", ROOT / "settings.ini", ROOT / "CHANGELOG.md"]:
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def is_current(outputs=""):
    "Whether the site in _docs was built from what is here now, with these outputs: saved or executed; from any if that is left out."
    stamp = SITE / ".built-from"
    return stamp.exists() and stamp.read_text().startswith(f"{fingerprint()} {outputs}")


def stage(saved):
    "Copy the sources, with the outputs that the site shall show."
    shutil.rmtree(STAGED, ignore_errors=True)
    shutil.copytree(SOURCE, STAGED, ignore=shutil.ignore_patterns(".*", "*.npz", "*.tmp"))
    executed = ROOT / "_build" / "nbs"
    if not saved:
        for path in executed.rglob("*.ipynb"):
            if (STAGED / path.relative_to(executed)).exists():
                shutil.copy(path, STAGED / path.relative_to(executed))
    demo.prepare(STAGED)


def process():
    "Run nbdev's processors (links, documentation of exported code, hidden cells) into _proc."
    _build_modidx()
    shutil.rmtree(PROCESSED, ignore_errors=True)
    proc_nbs(path=STAGED, force=True, n_workers=2)
    for path in PROCESSED.rglob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        up = "../" * (len(path.relative_to(PROCESSED).parts) - 1)
        within_section = False
        for cell in notebook.cells:
            cell.source = relative_links(cell.source, up)
            if cell.cell_type == "markdown":
                cell.source = finish_site.with_links(cell.source, up)
            within_section |= cell.cell_type == "markdown" and bool(re.search(r"^## ", cell.source, re.M))
            if cell.cell_type == "code":
                cell.source = re.sub(r"^(#\| fig-alt: )([^\"].*)$", lambda m: m[1] + json.dumps(m[2], ensure_ascii=False), cell.source, flags=re.M)  # a colon would end it
                if is_long(cell.source):
                    cell.source = cell.source.replace("#| code-fold: show", "#| code-fold: true")
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                if "text/markdown" in data:
                    shown = finish_site.with_source(data["text/markdown"], path.relative_to(PROCESSED).with_suffix(".html").as_posix())
                    shown = finish_site.with_links(documentation(relative_links(shown, up)), up)
                    data["text/markdown"] = shown if within_section else re.sub(r"^### ", "## ", shown, flags=re.M)
                if "image/svg+xml" in data:
                    output["data"] = finish_site.smaller_plot(data)
        nbformat.write(notebook, path)
    finish_site.write_sources(PROCESSED, lambda text: finish_site.with_links(relative_links(NbdevLookup().linkify(text), ""), ""))


def is_long(source):
    "Whether exported code would stand in the way of a reader: classes, which are documented above it, private functions, and whatever is long."
    public = re.search(r"^def [a-z]", source, re.M)
    return bool(re.search(r"^class ", source, re.M) or (re.search(r"^def _", source, re.M) and not public) or source.count("\n") > 30)


def relative_links(text, up):
    "Links to this site's own address become relative, so that the site works from a folder."
    config = get_config()
    base = (config.doc_host + config.doc_baseurl).rstrip("/") + "/"
    return re.sub(r"^output-file: .*\n", "", text.replace(f"]({base}", f"]({up}"), flags=re.M)


def documentation(markdown):
    "What nbdev shows of a public name, in Keras' manner: classes called so, no guessed types, docstring sections as lists."
    markdown = re.sub(r"^(def) (?=[A-Z]\w*\()", "class ", markdown, flags=re.M)
    # nbdev links names in the comments of a signature, too, where a link is only its characters
    markdown = re.sub(r"^```.*?^```", lambda code: re.sub(r"\[(`[^`]+`)\]\([^)]*\)", r"\1", code[0]), markdown, flags=re.M | re.S)
    markdown = re.sub(r"(\w+):(?:NoneType|bool|str|int|float)=", r"\1=", markdown)
    lines, item = [], re.compile(r"^    (`?[\w*]+`?(?:,\s+`?[\w*]+`?)*,?): (.*)")
    section = None
    for line in markdown.split("\n"):
        heading = re.match(r"^(Args|Call arguments|Input shape|Output shape|Raises|Returns|Example|Reference):\s*(.*)$", line)
        if heading:
            section = heading[1]
            lines += ["", f"**{section}** {heading[2]}".rstrip(), ""]
        elif section and line.startswith("    "):
            entry = item.match(line) if section in ITEMS else None
            names = entry and ", ".join(f"`{name.strip()}`" for name in entry[1].strip(",").split(","))
            lines.append(f"- {names}: {entry[2]}" if entry else re.sub(r"^ +", "  " if section in ITEMS else "", line))
        else:
            lines.append(line)
    return "\n".join(lines)


def render():
    "Render _proc into _proc/_docs."
    if shutil.which("quarto"):
        subprocess.run(["quarto", "render", str(PROCESSED), "--no-execute", "-M", "html-math-method:katex", "-M", "respect-user-color-scheme:true"], check=True)
    else:
        subprocess.run([sys.executable, "-m", "smalldocs.cli", "render", str(PROCESSED)], check=True)
    return PROCESSED / "_docs"


def localise(site):
    "Nothing is fetched from elsewhere: mathematics is set by the site's own KaTeX, fonts are its own."
    for page in site.rglob("*.html"):
        up = "../" * (len(page.relative_to(site).parts) - 1)
        text = KATEX_CDN.sub(f"{up}assets/katex/", page.read_text(encoding="utf8"))
        text = REMOTE_SCRIPT.sub("", text)  # Quarto's require.js for widgets, of which there are none
        page.write_text(text, encoding="utf8")
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf8")
        sheet.write_text(re.sub(r"@import url\([^)]*//fonts\.[^)]*\);?", "", text), encoding="utf8")


def write_readme():
    "README.md is the home page, with links that work on GitHub."
    config = get_config()
    site = (config.doc_host + config.doc_baseurl).rstrip("/") + "/"
    notebook = nbformat.read(SOURCE / "index.ipynb", 4)
    cells = []
    for cell in notebook.cells:
        if 'class="digit-demo"' in cell.source:  # needs scripts, which GitHub does not run
            continue
        directives = re.findall(r"^#\| *(.+)$", cell.source, re.M) if cell.cell_type == "code" else []
        if "echo: false" in directives:  # only what it shows
            cells += [nbformat.v4.new_markdown_cell(output.data["text/markdown"]) for output in cell.outputs]
        elif not any(d == "hide" or d.startswith("default_exp") for d in directives):
            cells.append(cell)
    notebook.cells = cells
    notebook.metadata["language_info"] = {"name": "python"}  # the fences say so
    exporter = MarkdownExporter()
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    markdown, _ = exporter.from_notebook_node(notebook)
    markdown = re.sub(r"\]\((?!https?:|#)([\w/-]+)\.ipynb", rf"]({site}\1.html", markdown)
    markdown = re.sub(r"\]\((?!https?:|#)(images/)", r"](nbs/\1", markdown)
    markdown = re.sub(r"\n{3,}", "\n\n", markdown).strip() + "\n"
    header = "<!-- Generated from nbs/index.ipynb by `make sync`. Edit the notebook. -->\n\n"
    (ROOT / "README.md").write_text(header + markdown, encoding="utf8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saved", action="store_true", help="use the outputs saved in nbs/")
    parser.add_argument("--if-changed", action="store_true", help="keep a site that is up to date")
    parser.add_argument("--readme", action="store_true", help="only write README.md")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ["PYTHONWARNINGS"] = "ignore:Found cells containing imports"  # nbdev's advice, to its worker processes
    start = time.time()
    write_readme()
    if args.readme:
        return
    sources, outputs = fingerprint(), "saved" if args.saved else "executed"
    if args.if_changed and is_current(outputs):
        print(f"→ {SITE.name} is up to date. Open {SITE.name}/index.html")
        return
    print(f"→ building the site with {'Quarto' if shutil.which('quarto') else 'smalldocs (Quarto is not installed)'}")
    stage(args.saved)
    process()
    built = render()
    localise(built)
    finish_site.finish(built, PROCESSED, STAGED)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(built, SITE)
    (SITE / ".built-from").write_text(f"{sources} {outputs}")
    print(f"→ built in {time.time() - start:.0f} s. Open {SITE.name}/index.html")


if __name__ == "__main__":
    main()
