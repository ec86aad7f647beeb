"""The same classifier in Keras, in the bare runtime, in ONNX Runtime and in the browser: answers, sizes and times of one digit.

    python nbs/benchmarks/ship.py
    python nbs/benchmarks/ship.py --demo   only the demo, in plain JavaScript and in WebAssembly

The weights are those of the demo, which the first tutorial made. Needs onnx, onnxscript, onnxruntime, playwright and a Chromium. What runs
in Python takes turns on one thread; a page times its own calls, many in a row, and its two ways take turns. Writes ship.json.
"""

import base64
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

from inference import medians, one_thread
from measure import environment, save

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_suffix(".json")
PAGE = '<!doctype html><meta charset="utf8"><script src="weights.js"></script><script src="digits.js"></script>'
ANSWER_ALL = """([base64, count]) => {
    const reader = kerasMmlDemo.load(kerasMmlDigitWeights), pixels = Uint8Array.from(atob(base64), char => char.charCodeAt(0)), all = [];
    const image = i => Float32Array.from(pixels.subarray(784 * i, 784 * (i + 1)), v => v / 255);
    for (let i = 0; i < count; i++) all.push(Array.from(reader.predict(image(i)).probabilities));
    const one = image(0), times = [];
    for (let round = 0; round < 15; round++) {
        const start = performance.now();
        for (let i = 0; i < 200; i++) reader.predict(one);
        times.push((performance.now() - start) / 200 / 1000);
    }
    return {probabilities: all, seconds: times.sort((a, b) => a - b)[7]};
}"""


# The median seconds of one answer in plain JavaScript and in WebAssembly, which take turns
COMPARE = """() => {
    const compiled = kerasMmlDemo.load(kerasMmlDigitWeights);
    delete window.kerasMmlKernels;
    const readers = [compiled, kerasMmlDemo.load(kerasMmlDigitWeights)], image = compiled.samples[0].image, times = {};
    for (let round = 0; round < 16; round++) {
        for (const reader of readers) {
            const start = performance.now();
            for (let i = 0; i < 1000; i++) reader.predict(image);
            if (round) (times[reader.engine] ||= []).push((performance.now() - start) / 1000 / 1000); // the first compiles
        }
    }
    return {seconds: Object.fromEntries(Object.entries(times).map(([name, all]) => [name, all.sort((a, b) => a - b)[7]]))};
}"""


def in_browser(script, code, *arguments):
    "What code returns in a page with the demo's script and this one for its weights."
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        shutil.copy(ROOT / "nbs" / "assets" / "demo" / "digits.js", folder)
        Path(folder, "weights.js").write_text(script, encoding="utf8")
        Path(folder, "index.html").write_text(PAGE, encoding="utf8")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(Path(folder, "index.html").as_uri())
        answers = page.evaluate(code, *arguments)
        answers["version"] = browser.version
        browser.close()
    return answers


def session(path):
    "ONNX Runtime with this file, on one thread."
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def packed_digits(weights):
    "The Keras model of the digit demo, from its weights as JSON text."
    import keras
    import numpy as np

    from keras_mml.layers import DenseMML
    from keras_mml.packing import unpack_ternary

    layers = [(DenseMML(saved["units"], activation=saved["activation"], packed=True), saved) for saved in json.loads(weights)["layers"]]
    model = keras.Sequential([keras.Input((784,)), *(layer for layer, _ in layers)])
    for layer, saved in layers:
        trits, bias = (np.frombuffer(base64.b64decode(saved[name]), dtype) for name, dtype in (("trits", "u1"), ("bias", "<f4")))
        trits = unpack_ternary(trits, (saved["inputs"], saved["units"]), bits=1.6)
        layer.set_ternary_state({"trits": trits, "kernel_scale": np.full(saved["units"], saved["scale"], "float32"), "bias": bias})
    return model


def measure_demo():
    "Seconds of one answer of the demo in each of its two ways."
    import build_site

    page = in_browser(build_site.weights_script(), COMPARE)
    print(f"  demo: {page['seconds']}", file=sys.stderr)
    return dict(environment={**environment(), "chromium": page["version"]}, seconds=page["seconds"])


def main():
    one_thread()
    sys.path.insert(0, str(ROOT / "tools"))
    if "--demo" in sys.argv[1:]:
        return save(RESULTS, {**json.loads(RESULTS.read_text()), "demo": measure_demo()})
    import keras
    import numpy as np
    import onnxruntime
    import torch

    import keras_mml
    from keras_mml import runtime
    from keras_mml.datasets import load_mnist

    import build_site

    weights = build_site.digit_weights()
    packed = packed_digits(weights)
    _, (images, labels) = load_mnist()
    x = images.reshape(-1, 784).astype("float32") / 255
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        packed.save(folder / "digits.keras")
        keras_mml.export_onnx(packed, folder / "digits.onnx")
        keras_mml.export_onnx(packed, folder / "rounded.onnx", exact=False)
        bare, exact, rounded = runtime.load(folder / "digits.keras"), session(folder / "digits.onnx"), session(folder / "rounded.onnx")
        sizes = {name: (folder / name).stat().st_size for name in ("digits.keras", "digits.onnx", "rounded.onnx")}
    sizes["weights.js"] = len(weights)

    name = exact.get_inputs()[0].name
    answers = {
        "Keras, packed": packed.predict(x, batch_size=1000, verbose=0),
        "bare runtime": bare(x),
        "ONNX Runtime": exact.run(None, {name: x})[0],
        "ONNX Runtime, rounded twice": rounded.run(None, {name: x})[0],
    }
    one, tensor = x[:1].copy(), torch.from_numpy(x[:1].copy())
    with torch.inference_mode():
        functions = {
            "Keras, packed": lambda: packed(tensor),
            "bare runtime": lambda: bare(one),
            "ONNX Runtime": lambda: exact.run(None, {name: one}),
            "ONNX Runtime, rounded twice": lambda: rounded.run(None, {name: one}),
        }
        seconds = medians(functions, seconds=5.0)
    page = in_browser(f"window.kerasMmlDigitWeights = {weights};", ANSWER_ALL, [base64.b64encode(images.tobytes()).decode(), len(images)])
    answers["browser"], seconds["browser"] = np.array(page["probabilities"]), page["seconds"]

    files = dict(zip(answers, ("digits.keras", "digits.keras", "digits.onnx", "rounded.onnx", "weights.js")))
    reference, records = answers["Keras, packed"], {}
    for place, probabilities in answers.items():
        records[place] = dict(
            file=files[place],
            bytes=sizes[files[place]],
            seconds=seconds[place],
            right=int((probabilities.argmax(1) == labels).sum()),
            other_answers=int((probabilities.argmax(1) != reference.argmax(1)).sum()),
            largest_difference=float(np.abs(probabilities - reference).max()),
        )
        print(f"  {place}: {records[place]}", file=sys.stderr)
    versions = {**environment(), "onnxruntime": onnxruntime.__version__, "chromium": page["version"]}
    save(RESULTS, dict(environment=versions, digits=len(labels), records=records, demo=measure_demo()))


if __name__ == "__main__":
    main()
