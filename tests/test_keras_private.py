"""The names of Keras that `keras_mml.keras_private` stands on, one by one: a new Keras that moved one is told by name."""

import importlib
import re
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_mml import keras_private

BACKEND = keras.backend.backend()


def made(layer, *shapes):
    layer.build(*shapes)
    return layer


LAYER, MODEL = made(keras.layers.Dense(3), (None, 4)), keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
GATE = ["_gate_dense"] if keras.__version__ >= "3.15" else []
PROJECTIONS = ["_query_dense", "_key_dense", "_value_dense", "_output_dense"]
ATTENTION = made(keras.layers.MultiHeadAttention(2, 4, **({"use_gate": True} if GATE else {})), (None, 5, 8), (None, 5, 8))
GROUPED = made(keras.layers.GroupQueryAttention(4, 4, 2), (None, 5, 8), (None, 5, 8))
OWNERS = {
    "a layer": (LAYER, ["_flatten_layers", "_layers", "_metrics", "_trainable", "_trainable_variables", "_non_trainable_variables",
                        "_inbound_nodes", "_tracker", "_untrack_variable"]),
    "its tracker": (LAYER._tracker, ["lock", "unlock"]),
    "a layer on torch": (LAYER, ["torch_params", "_post_track_variable", "_post_untrack_variable"] if BACKEND == "torch" else []),
    "a tensor": (MODEL.outputs[0], ["_keras_history"]),
    "a masked tensor": (keras.layers.Embedding(9, 4, mask_zero=True)(keras.Input((5,))), ["_keras_mask"]),
    "a variable": (LAYER.kernel, ["_value"]),
    "attention": (ATTENTION, ["_compute_attention", "_compute_causal_mask", "_build_attention", *PROJECTIONS, *GATE]),
    "grouped attention": (GROUPED, PROJECTIONS),
}  # fmt: skip


@pytest.mark.parametrize("owner, name", [(owner, name) for owner, (_, names) in OWNERS.items() for name in names])
def test_keras_has_the_name(owner, name):
    assert hasattr(OWNERS[owner][0], name), f"Keras {keras.__version__} has no `{name}` of {owner}: mend `keras_mml.keras_private`"


@pytest.mark.parametrize("module, name", [(keras_private.SAVING, "load_model"), (keras_private.TRAINER, "")])
def test_keras_has_the_module(module, name):
    assert not name or hasattr(importlib.import_module(module), name)
    assert type(MODEL).fit.__module__ == keras_private.TRAINER


def test_attention_asks_for_its_inner_part():
    "And for each projection: with all of them replaced, nothing of Keras' own is left."
    seen = []

    class Watched(keras_private.OpenAttention):
        def attention(self, *args, **kwargs):
            seen.append("attention")
            return super().attention(*args, **kwargs)

    layer, x = Watched(2, 4), np.ones((1, 3, 8), "float32")
    layer(x, x)
    for name, part in keras_private.projections_of(layer).items():
        part.call = lambda *args, name=name, call=part.call: seen.append(name) or call(*args)
    layer(x, x)
    assert sorted(seen) == ["attention", "attention", "key", "output", "query", "value"]


@pytest.mark.any_backend
def test_the_layers_have_no_private_names_of_keras():
    "Nor has what makes whole models; what copies looks through belongs to torch."
    package = Path(keras_private.__file__).parent
    names = ("callbacks", "command_line", "conversion", "copies", "distribution")
    paths = [*(package / "layers").glob("*.py"), *(package / f"{name}.py" for name in names)]
    private = [rf"\.{name}\b" for _, names in OWNERS.values() for name in names if name.startswith("_")] + [r"keras\.src"]
    found = {path.name: re.findall("|".join(private), path.read_text(encoding="utf8")) for path in paths}
    assert not {name: names for name, names in found.items() if names}
