"""Build the website into _docs: nbdev prepares the notebooks, Quarto renders them, or smalldocs where Quarto is missing.

    python tools/build_site.py            from the outputs that are saved in nbs/, unless _docs is that already
    python tools/build_site.py --readme   only README.md, from nbs/index.ipynb
"""

import argparse
import base64
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import finish_site
import nbformat
import yaml
from nbconvert import MarkdownExporter
from nbdev.doclinks import NbdevLookup, _build_modidx
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent
SOURCE, PROCESSED, SITE = ROOT / "nbs", ROOT / "_proc", ROOT / "_docs"
WEIGHTS = re.compile(r'<script type=\\*"application/json\\*" class=\\*"digit-weights\\*">(.*?)</script>')  # also in a notebook's source
MADE_FROM = ("nbs", "keras_mml", "tools", "_quarto.yml", "settings.ini", "CHANGELOG.md")


def fingerprint():
    "Of everything the site is made from."
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    files = git(["git", "ls-files", "--cached", "--others", "--exclude-standard", *MADE_FROM]).stdout
    contents = git(["git", "hash-object", "--no-filters", "--stdin-paths"], input=files).stdout
    return hashlib.sha256((files + contents).encode()).hexdigest()


def is_current():
    "Whether the site in _docs was built from what is here now."
    stamp = SITE / ".built-from"
    return stamp.exists() and stamp.read_text() == fingerprint()


def process():
    "Run nbdev's processors (links, documentation of exported code, hidden cells) into _proc, and go over what they wrote."
    _build_modidx()
    shutil.rmtree(PROCESSED, ignore_errors=True)
    proc_nbs(path=SOURCE, force=True, n_workers=2)
    for path in PROCESSED.rglob("*.ipynb"):
        process_page(path, path.relative_to(PROCESSED).with_suffix(".html"))
    changes = NbdevLookup().linkify((ROOT / "CHANGELOG.md").read_text(encoding="utf8").split("\n", 1)[1])
    changes = linked(re.sub(r"^## (\S+), .*$", r"## \1 {#v\1}", changes, flags=re.M), "")
    front = "---\ntitle: Changelog\ndescription: What changed, version by version\nimage: /cards/index.png\nrepo-actions: false\n---\n"
    (PROCESSED / "assets" / "demo" / "weights.js").write_text(weights_script(), encoding="utf8")
    (PROCESSED / "changelog.md").write_text(front + changes, encoding="utf8")


def digit_weights():
    "The weights of the digit demo, as JSON text: those that the first tutorial wrote into its output."
    tutorial = (SOURCE / "tutorials" / "mnist.ipynb").read_text(encoding="utf8")
    return json.loads(f'"{WEIGHTS.search(tutorial)[1]}"')


def weights_script():
    "A script for pages, which may fetch nothing from a folder: the weights of the digit demo, and the kernels that compute with them."
    from keras_mml.native.wasm import compile_wasm  # here, since it imports Keras

    with tempfile.TemporaryDirectory() as folder:
        compile_wasm(kernels := Path(folder, "kernels.wasm"))
        code = base64.b64encode(kernels.read_bytes()).decode()
    return f'window.kerasMmlDigitWeights = {digit_weights()};\nwindow.kerasMmlKernels = "{code}";\n'


def process_page(path, page):
    notebook, up, name = nbformat.read(path, 4), "../" * (len(page.parts) - 1), "-".join(page.with_suffix("").parts)
    within_section, plots = False, []
    written = nbformat.read(SOURCE / path.relative_to(PROCESSED), 4).cells  # before nbdev took the magics away
    files = {cell.id: cell.source.split()[1] for cell in written if cell.source.startswith("%%c ")}
    notebook.cells = [as_c(cell.source, files[cell.id]) if cell.id in files else cell for cell in notebook.cells]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_alternatives(linked(cell.source, up))
            within_section |= bool(re.search(r"^## ", cell.source, re.M))
        elif cell.cell_type == "code":
            options, code = cell_options(cell.source)
            if options.get("code-fold") == "show" and is_long(code):
                options["code-fold"] = "true"
            cell.source = "".join(f"#| {key}: {value}\n" for key, value in options.items()) + code
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data:
                shown = linked(documentation(finish_site.with_source(data["text/markdown"], page)), up)
                data["text/markdown"] = shown if within_section else re.sub(r"^### ", "## ", shown, flags=re.M)
            if "text/html" in data:
                data["text/html"] = WEIGHTS.sub(f'<script src="{up}assets/demo/weights.js"></script>', data["text/html"])
            if "image/svg+xml" in data:
                plots.append(finish_site.raster(data["image/svg+xml"], zoom=2))  # for sharp screens
                file = f"plots/{name}-{len(plots)}.webp"
                finish_site.save(plots[-1], PROCESSED / file)
                width, height = (length // 2 for length in plots[-1].size)
                attributes = f'alt={options.get("fig-alt", "")} width="{width}" height="{height}" loading="lazy"'
                wide = " wide" * (width > 700)  # those scroll on a phone
                output.data = {"text/html": f'<p><img class="plot{wide}" src="{up}{file}" {attributes}></p>'}
    front = notebook.cells[0]
    texts = {key: re.sub(r"[`*]", "", str(text)) for key, text in yaml.safe_load(front.source.strip("-\n ")).items()}
    card = f"cards/{name if plots else 'index'}.png"
    if plots or name == "index":
        finish_site.write_card(PROCESSED / card, texts["title"], texts["description"], *plots[:1])
    front.source = re.sub(r"^output-file: .*\n", "", front.source, flags=re.M).replace("---\n", f"---\nimage: /{card}\n", 1)
    nbformat.write(notebook, path)


def as_c(code, file):
    "A piece of a C file: as C, under the name of the file."
    return nbformat.v4.new_markdown_cell(f'```{{.c filename="{file}"}}\n{code}\n```')


def cell_options(source):
    "The options at the top of a cell, and its code. Each is there once (nbdev adds to what is given, the last counts), texts in quotes."
    lines = source.split("\n")
    head = list(itertools.takewhile(lambda line: line.startswith("#|"), lines))
    options = dict(re.findall(r"^#\| ([\w-]+): *(.*)$", "\n".join(head), re.M))
    quoted = lambda value: value if re.match(r'[\w-]*$|"', value) else json.dumps(value, ensure_ascii=False)
    return {key: quoted(value) for key, value in options.items()}, "\n".join(lines[len(head) :])


def with_alternatives(markdown):
    "An image alone in its paragraph is a figure to Quarto, and its description the caption: it shall be the alternative text."
    alone = r"(?:(?<=\n\n)|\A)!\[(.+)\]\(([^()\s]+)\)(?=\n\n|\s*\Z)"
    return re.sub(alone, lambda m: f"![]({m[2]}){{fig-alt={json.dumps(m[1], ensure_ascii=False)}}}", markdown)


def is_long(source):
    "Whether exported code would be in a reader's way: classes, which are documented above it, private functions, whatever is long."
    public = re.search(r"^def [a-z]", source, re.M)
    return bool(re.search(r"^class ", source, re.M) or (re.search(r"^def _", source, re.M) and not public) or source.count("\n") > 30)


def linked(markdown, up):
    "With links to public names; and those to this site's own address are relative, so that the site works from a folder."
    return finish_site.with_links(markdown.replace(f"]({finish_site.address()}", f"]({up}"), up)


def documentation(markdown):
    "What nbdev shows of a public name, in Keras' manner: classes called so, no guessed types, docstring sections as lists."
    markdown = re.sub(r"^(def) (?=[A-Z]\w*\()", "class ", markdown, flags=re.M)
    # nbdev links names in the comments of a signature, too, where a link is only its characters
    markdown = re.sub(r"^```.*?^```", lambda code: re.sub(r"\[(`[^`]+`)\]\([^)]*\)", r"\1", code[0]), markdown, flags=re.M | re.S)
    markdown = re.sub(r"(\w+):(?:NoneType|bool|str|int|float)=", r"\1=", markdown)
    lines, section, has_items = [], None, False
    for line in markdown.split("\n"):
        heading = re.match(r"^(Args|Call arguments|Input shape|Output shape|Raises|Returns|Example|Reference):\s*(.*)$", line)
        if heading:
            section, has_items = heading[1], heading[1] in ("Args", "Call arguments", "Raises")
            lines += ["", f"**{section}** {heading[2]}".rstrip(), ""]
        elif section and line.startswith("    "):
            item = has_items and re.match(r"^    (`?[\w*]+`?(?:,\s+`?[\w*]+`?)*,?): (.*)", line)
            names = item and ", ".join(f"`{name.strip()}`" for name in item[1].strip(",").split(","))
            lines.append(f"- {names}: {item[2]}" if item else re.sub(r"^ +", "  " if has_items else "", line))
        else:
            lines.append(line)
    return "\n".join(lines)


def write_readme():
    "README.md is the home page, with links that work on GitHub."
    notebook = nbformat.read(SOURCE / "index.ipynb", 4)
    cells, notebook.cells = notebook.cells, []
    for cell in cells:
        if 'class="digit-demo"' in cell.source:  # needs scripts, which GitHub does not run
            continue
        directives = re.findall(r"^#\| *(.+)$", cell.source, re.M) if cell.cell_type == "code" else []
        if "echo: false" in directives:  # only what it shows
            notebook.cells += [nbformat.v4.new_markdown_cell(output.data["text/markdown"]) for output in cell.outputs]
        elif not any(d == "hide" or d.startswith("default_exp") for d in directives):
            notebook.cells.append(cell)
    notebook.metadata["language_info"] = {"name": "python"}  # the fences say so
    markdown, _ = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(notebook)
    markdown = re.sub(r"\]\((?!https?:|#)([\w/-]+)\.ipynb", rf"]({finish_site.address()}\1.html", markdown)
    markdown = re.sub(r"\n{3,}", "\n\n", re.sub(r"\]\((?!https?:|#)(images/)", r"](nbs/\1", markdown)).strip()
    header = "<!-- Generated from nbs/index.ipynb by `make sync`. Edit the notebook. -->\n\n"
    (ROOT / "README.md").write_text(f"{header}{markdown}\n", encoding="utf8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="only write README.md")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ["PYTHONWARNINGS"] = "ignore:Found cells containing imports"  # nbdev's advice, to its worker processes
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background, where shells have it ignored
    write_readme()
    if args.readme:
        return
    sources = fingerprint()
    if not is_current():
        quarto = shutil.which("quarto")
        print(f"→ building the site with {'Quarto' if quarto else 'smalldocs (Quarto is not installed)'}")
        process()
        renderer = [quarto] if quarto else [sys.executable, "-m", "smalldocs.cli"]
        options = ["--no-execute"] if quarto else []  # which Quarto wants behind the folder
        subprocess.run([*renderer, "render", PROCESSED, *options], check=True)
        finish_site.finish(PROCESSED / "_docs", SOURCE)
        shutil.rmtree(SITE, ignore_errors=True)
        shutil.move(PROCESSED / "_docs", SITE)
        (SITE / ".built-from").write_text(sources)
    print(f"→ {SITE.name} is up to date. Open {SITE.name}/index.html")


if __name__ == "__main__":
    main()
