"""The digit demo in a real browser: the answers of the packed layers in Python, from a folder, without a network."""

import base64
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from keras_mml.datasets import load_mnist

NOTEBOOKS = Path(__file__).resolve().parent.parent / "nbs"
sys.path[:0] = [str(NOTEBOOKS.parent / "tools"), str(NOTEBOOKS / "benchmarks")]
import build_site
import ship

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.browser,
    pytest.mark.skipif(not BROWSER, reason="The demo is tested in Chromium. Install it, for example with `apt-get install chromium`."),
]
PAGE = """<!doctype html><html lang="en"><meta charset="utf8"><title>Digits</title>
<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="digits.css">
<div class="digit-demo"></div><script src="weights.js"></script><script src="digits.js"></script>"""
THREE = [(0.3, 0.25), (0.5, 0.16), (0.66, 0.26), (0.6, 0.42), (0.46, 0.48), (0.64, 0.56), (0.7, 0.7), (0.52, 0.85), (0.3, 0.78)]


@pytest.fixture(scope="module")
def weights():
    return build_site.digit_weights()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def script():
    return build_site.weights_script()


@pytest.fixture
def open_page(browser, script, tmp_path):
    "A function that opens the demo from a folder, and sees to it that nothing else is asked for and nothing goes wrong."
    for name in ("digits.js", "digits.css"):
        shutil.copy(NOTEBOOKS / "assets" / "demo" / name, tmp_path)
    (tmp_path / "weights.js").write_text(script, encoding="utf8")
    (tmp_path / "index.html").write_text(PAGE, encoding="utf8")
    opened, requests, errors = [], [], []

    def open_page(before="", **settings):
        page = browser.new_page(**settings)
        page.add_init_script(before)
        opened.append(page)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((tmp_path / "index.html").as_uri())
        return page

    yield open_page
    for page in opened:
        page.close()
    assert not errors and all(url.startswith("file:") for url in requests)


def corner(page, x, y):
    "A point of the pad, whose sides are 1, in pixels of the page."
    box = page.locator(".dd-pad").bounding_box()
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


def answer(page):
    "The digit that is shown, once the next picture is drawn."
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.inner_text(".dd-digit")


def test_the_weights_are_small(weights):
    assert len(weights) <= 100_000


def test_all_test_digits_are_read_as_in_python(open_page, weights):
    (_, _), (images, labels) = load_mnist()
    images = images.reshape(-1, 784)
    expected = ship.packed_digits(weights).predict(images.astype("float32") / 255, batch_size=1000, verbose=0)
    page = open_page()
    received = page.evaluate(
        """(base64) => {
            const compiled = kerasMmlDemo.load(kerasMmlDigitWeights), image = new Float32Array(784), all = [], others = [];
            delete window.kerasMmlKernels;
            const plain = kerasMmlDemo.load(kerasMmlDigitWeights);
            const pixels = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
            for (let i = 0; i < pixels.length; i += 784) {
                for (let k = 0; k < 784; k++) image[k] = pixels[i + k] / 255;
                const one = compiled.predict(image), other = plain.predict(image);
                all.push(one.probabilities);
                if (!one.logits.every((value, digit) => Object.is(value, other.logits[digit]))) others.push(i / 784);
            }
            return { engines: [compiled.engine, plain.engine], all, others };
        }""",
        base64.b64encode(images.tobytes()).decode(),
    )
    assert received["engines"] == ["WebAssembly", "JavaScript"]
    assert received["others"] == []  # digits whose logits differ in a bit
    received = np.array(received["all"])
    different, largest = (received.argmax(1) != expected.argmax(1)).sum(), np.abs(received - expected).max()
    right = (received.argmax(1) == labels).mean()
    print(f"{different} of {len(images)} answers differ, probabilities by {largest:.1e} at most; {right:.2%} are right")
    assert len(received) == 10_000 and different == 0 and largest < 1e-5


@pytest.mark.parametrize(
    "before",
    [
        "delete window.WebAssembly",
        "WebAssembly.Module = class { constructor() { throw new WebAssembly.CompileError('no vectors') } }",
        "Object.defineProperty(window, 'kerasMmlKernels', { get: () => 'AGFzbQ==', set() {} })",
    ],
    ids=["no WebAssembly", "no vectors", "damaged"],
)
def test_plain_javascript_answers_where_kernels_cannot(open_page, before):
    page = open_page(before)
    assert page.evaluate("kerasMmlDemo.load(kerasMmlDigitWeights).engine") == "JavaScript"
    assert answer(page) == "3"
    assert page.inner_text(".dd-count").endswith("with JavaScript.")


def test_steps_are_those_of_the_image_that_was_asked(open_page):
    page = open_page()
    assert page.inner_text(".dd-count").endswith("with WebAssembly.")
    logits, steps, again = page.evaluate(
        """() => {
            const reader = kerasMmlDemo.load(kerasMmlDigitWeights), image = reader.samples[3].image.slice(), result = reader.predict(image);
            image.fill(0);
            return [Array.from(result.logits), Array.from(result.steps[3].outputs), result.steps === result.steps];
        }"""
    )
    assert logits == steps and again


def test_the_sums_only_add_and_subtract(open_page):
    source = open_page().evaluate("kerasMmlDemo.ternarySum.toString()")
    assert "+=" in source and "-=" in source
    assert not re.search(r"[*/%&|^~]|<<|>>|Math|\bmap\b|\breduce\b", source)


def test_a_stroke_is_answered(open_page):
    page = open_page()
    page.click(".dd-clear")
    assert answer(page) == "?"
    page.mouse.move(*corner(page, *THREE[0]))
    page.mouse.down()
    for x, y in THREE[1:]:
        page.mouse.move(*corner(page, x, y), steps=5)
    assert answer(page) == "3"  # before the stroke has ended
    page.mouse.up()
    answer(page)
    assert page.inner_text(".dd-live").startswith("It reads a 3")
    milliseconds = page.evaluate(
        """() => {
            const reader = kerasMmlDemo.load(window.kerasMmlDigitWeights), stroke = [{ x: 9, y: 4 }, { x: 18, y: 4 }, { x: 12, y: 23 }];
            const start = performance.now();
            for (let i = 0; i < 20; i++) reader.predict(kerasMmlDemo.prepare([stroke]));
            return (performance.now() - start) / 20;
        }"""
    )
    print(f"an answer in {milliseconds:.1f} ms")
    assert milliseconds < 50  # what one notices; it takes about one


def test_finished_answers_are_counted(open_page, weights):
    page = open_page()
    saved = sum(layer["inputs"] * layer["units"] for layer in json.loads(weights)["layers"])
    count = lambda: int(page.inner_text(".dd-count b").replace(",", "")) / saved
    assert count() == 1  # the sample that is shown first
    page.mouse.move(*corner(page, *THREE[0]))
    page.mouse.down()
    for x, y in THREE[1:]:
        page.mouse.move(*corner(page, x, y), steps=5)
        answer(page)
    assert count() == 1
    page.mouse.up()
    answer(page)
    assert count() == 2
    page.click(".dd-clear")
    assert answer(page) == "?" and count() == 2


def test_nothing_is_asked_of_an_empty_pad(open_page):
    page = open_page()
    disabled = "[...document.querySelectorAll('.dd-bars button')].map((button) => button.disabled)"
    assert page.evaluate(disabled) == [False] * 10
    page.click(".dd-clear")
    answer(page)
    assert page.evaluate(disabled) == [True] * 10


def test_the_border_ends_a_stroke(open_page):
    page = open_page()
    page.click(".dd-clear")
    page.mouse.move(*corner(page, 0.5, 0.2))
    page.mouse.down()
    for x, y in ((1.2, 0.2), (1.2, 0.8), (0.5, 0.8)):
        page.mouse.move(*corner(page, x, y), steps=10)
    page.mouse.up()
    answer(page)
    ink = """(y) => {
        const pad = document.querySelector('.dd-pad');
        return pad.getContext('2d').getImageData(0.985 * pad.width, y * pad.height, 1, 1).data[3];
    }"""
    assert [page.evaluate(ink, y) > 0 for y in (0.2, 0.5, 0.8)] == [True, False, True]
    assert answer(page) != "?"


def test_a_finger_draws(open_page):
    page = open_page(has_touch=True, viewport={"width": 390, "height": 844}, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("getComputedStyle(document.querySelector('.dd-pad')).touchAction") == "none"
    page.tap(".dd-clear")
    session = page.context.new_cdp_session(page)
    for i, (x, y) in enumerate(THREE):
        x, y = corner(page, x, y)
        session.send("Input.dispatchTouchEvent", {"type": "touchMove" if i else "touchStart", "touchPoints": [{"x": x, "y": y}]})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert answer(page) == "3"


def test_the_keyboard_is_enough(open_page):
    page = open_page(reduced_motion="reduce")
    seen = []
    for _ in range(30):
        page.keyboard.press("Tab")
        label, outline = page.evaluate(
            "(e => [e.ariaLabel || e.textContent, getComputedStyle(e).outlineStyle])(document.activeElement)"
        )
        assert outline == "solid" or label == "Digits" or not label.strip(), label
        if label.startswith("A handwritten"):
            page.keyboard.press("Enter")
            assert answer(page) == label[-1]
            assert page.inner_text(".dd-live").startswith(f"It reads {'an' if label[-1] == '8' else 'a'} {label[-1]}, with")
            seen.append(label[-1])
        if len(seen) == 10:
            break
    assert seen == list("0123456789")
    page.keyboard.press("Escape")
    assert answer(page) == "?"
    assert page.evaluate("getComputedStyle(document.querySelector('.dd-bar')).transitionDuration") == "0s"


def test_the_votes_add_up(open_page):
    page = open_page()
    for digit in range(10):
        page.click(f".dd-bars button:nth-child({digit + 1})")
        answer(page)
        text = page.inner_text(".dd-vote-text").replace(",", "")
        found = re.search(r"(\d+) added − (\d+) subtracted = (−?\d+)", text).groups()
        added, subtracted, total = (int(number.replace("−", "-")) for number in found)
        reader = "const r = kerasMmlDemo.load(kerasMmlDigitWeights)"
        sums = page.evaluate(f"(digit) => {{ {reader}; return r.predict(r.samples[3].image).steps[3].sums[digit] }}", digit)
        assert added - subtracted == total == sums
