"""The digit demo on the site: its weights are the ones that the tutorial wrote into its output, for any page to load."""

import base64
import json
import re

TUTORIAL = "tutorials/mnist.ipynb"
WEIGHTS = re.compile(r'<script type="application/json" class="digit-weights">(.*?)</script>', re.S)
EMBEDDED = """<link rel="stylesheet" href="../assets/demo/digits.css">
<div class="digit-demo"><noscript>Here you could draw a digit, with JavaScript.</noscript></div>
<script defer src="../assets/demo/weights.js"></script>
<script defer src="../assets/demo/digits.js"></script>"""


def read(notebooks):
    "The tutorial below the folder `notebooks`, as JSON; its output that shows the demo; and the weights in that, as JSON text."
    notebook = json.loads((notebooks / TUTORIAL).read_text(encoding="utf8"))
    for output in (output for cell in notebook["cells"] for output in cell.get("outputs", [])):
        found = WEIGHTS.search("".join(output.get("data", {}).get("text/html", "")))
        if found:
            return notebook, output, found[1]
    raise SystemExit(f"{TUTORIAL} has no weights for the demo in its outputs. Execute it: make notebooks")


def saved_weights(notebooks):
    return read(notebooks)[2]


def packed_model(weights):
    "The Keras model that has these weights, which are JSON text."
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


def prepare(notebooks):
    "Write assets/demo/weights.js, and let the tutorial load what its output held a copy of."
    notebook, output, weights = read(notebooks)
    (notebooks / "assets" / "demo" / "weights.js").write_text(f"window.kerasMmlDigitWeights = {weights};\n", encoding="utf8")
    output["data"]["text/html"] = EMBEDDED
    (notebooks / TUTORIAL).write_text(json.dumps(notebook, ensure_ascii=False, indent=1), encoding="utf8")
