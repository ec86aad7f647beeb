"""The runtime: what it predicts against Keras, what it refuses, and thousands of damaged files."""

# ruff: noqa: E501
import copy
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
from cases import CASES, VARIANTS, data_side_by_side, lengths, side_by_side
from keras import layers, ops

import keras_mml
from keras_mml import runtime
from keras_mml.layers import (
    GRUMML,
    Conv1DMML,
    Conv2DMML,
    DenseMML,
    DepthwiseConv2DMML,
    PatchEmbedding,
    Patches,
    RMSNorm,
    TokenEmbedding,
    TransformerBlockMML,
)  # fmt: skip
from keras_mml.native import kernels

ROOT = Path(__file__).resolve().parent.parent
PIXELS = np.random.default_rng(0).normal(size=(3, 4, 4))


def saved(model, packed=True):
    "The model, packed, and the bytes of its file."
    for weight in model.weights:  # also those that start as zeros and ones
        if "seed" not in weight.name and "count" not in weight.name:
            noise = np.random.normal(size=weight.shape).astype("float32")
            weight.assign(np.abs(noise) + 0.1 if "variance" in weight.name else ops.convert_to_numpy(weight) + 0.1 * noise)
    model = keras_mml.pack(model) if packed else model
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        return model, Path(folder, "model.keras").read_bytes()


def sequential(shape, *parts, dtype="float32", packed=True):
    return saved(keras.Sequential([keras.Input(shape, dtype=dtype), *parts]), packed)


def differences(expected, received):
    "The largest difference of each sample, relative to the largest output."
    a, b = (np.concatenate([np.reshape(ops.convert_to_numpy(v), (len(v), -1)) for v in keras.tree.flatten(tree)], axis=1) for tree in (expected, received))
    assert a.shape == b.shape
    return np.abs(a - b).max(axis=1) / max(np.abs(a).max(), 1e-3)


def assert_rounded_alike(expected, received):
    "Samples are the same up to the rounding of floats. In a few, an activation between two integers was rounded to the other one."
    gaps = differences(expected, received)
    assert len(gaps) >= 50 and (gaps > 1e-5).mean() <= 0.1 and gaps.max() < 0.05, np.sort(gaps)[-8:]


MODELS = {
    "mlp": ((6, 5), [layers.Rescaling(0.5, 1), layers.Flatten(), DenseMML(70, "relu", norm_gain=True), layers.Dropout(0.1), DenseMML(9, "gelu", scale="channel"),
                     layers.Dense(8), layers.Activation("tanh"), layers.BatchNormalization(), layers.LayerNormalization(), layers.RMSNormalization(),
                     DenseMML(5, norm=None, activation_bits=4), layers.Softmax()]),
    "reshapes": ((4, 6), [layers.Permute((2, 1)), layers.Reshape((-1, 8)), DenseMML(5, use_bias=False), RMSNorm(use_bias=True), layers.LeakyReLU(),
                          layers.GlobalAveragePooling1D(), layers.RepeatVector(2), DenseMML(3)]),
    "convnet": ((12, 12, 3), [Conv2DMML(8, 3, padding="same", activation="relu", norm_gain=True), layers.MaxPooling2D(), layers.BatchNormalization(),
                              DepthwiseConv2DMML(3, depth_multiplier=2, strides=2), layers.ReLU(max_value=6), Conv2DMML(8, 2, groups=2, norm=None),
                              layers.GlobalMaxPooling2D(), DenseMML(4)]),
    "keras convnet": ((9, 9, 4), [layers.ZeroPadding2D(((1, 0), (2, 1))), layers.Conv2D(6, 3, strides=2, padding="same", groups=2, activation="silu"),
                                  layers.DepthwiseConv2D(2, depth_multiplier=2), layers.UpSampling2D((1, 2)), layers.AveragePooling2D(2, padding="same"),
                                  layers.Flatten(), DenseMML(4)]),
    "sequences": ((16, 4), [Conv1DMML(6, 3, padding="causal", dilation_rate=2, activation="relu"), layers.Conv1D(5, 2, strides=2, padding="causal"),
                            layers.AveragePooling1D(2), Conv1DMML(6, 2), layers.MaxPooling1D(2, padding="same"), layers.Flatten(), DenseMML(4)]),
    "vision": ((8, 8, 1), [Patches(4), PatchEmbedding(4, 8, with_positions=True), TransformerBlockMML(8, 16, 2, mixer="softmax", causal=False, rotary=False),
                           layers.GlobalAveragePooling1D(), DenseMML(3)]),
}  # fmt: skip


def test_every_layer_predicts_what_it_predicts_in_keras():
    cases = CASES + VARIANTS
    model, content = saved(side_by_side(cases))
    x = data_side_by_side(cases, 50)
    expected, received = model.predict(x, verbose=0), runtime.load(content)(x)
    gaps = {case.name: differences(expected[name], received[name]) for name, case in zip(x, cases, strict=True)}
    assert len(gaps) == len(cases)
    assert not {name: np.sort(g)[-8:] for name, g in gaps.items() if (g > 1e-5).mean() > 0.1 or g.max() >= 0.05}


@pytest.mark.parametrize("name", MODELS)
def test_it_predicts_what_keras_predicts(name):
    shape, parts = MODELS[name]
    model, content = sequential(shape, *parts)
    x = np.random.normal(size=(50, *shape)).astype("float32")
    assert_rounded_alike(model.predict(x, verbose=0), runtime.load(content)(x))


def test_a_graph_with_several_inputs_and_outputs():
    a, b = keras.Input((6,), name="first"), keras.Input((6,), name="second")
    shared = DenseMML(8, activation="relu")
    x, y = shared(a), shared(b)
    z = layers.Concatenate()([layers.Add()([x, y]), layers.Multiply()([x, y]), x - y * 2.0, layers.Maximum()([x, y]), layers.Average()([x, y])])
    inner = keras.Sequential([DenseMML(7), layers.Dense(5)])
    model, content = saved(keras.Model({"first": a, "second": b}, {"one": inner(z), "two": [DenseMML(3)(inner(z)), x]}))
    given = {name: np.random.normal(size=(50, 6)).astype("float32") for name in ("first", "second")}
    loaded = runtime.load(content)
    expected, received = model.predict(given, verbose=0), loaded(given)
    assert received.keys() == {"one", "two"} and len(received["two"]) == 2
    assert_rounded_alike(expected, received)
    with pytest.raises(ValueError, match="takes a dictionary with"):
        loaded(given["first"])


def test_integers_are_equal_bit_by_bit():
    "Outputs of a chain without functions that are rounded differently, one row, a few, and many; so are the sums and the rounded inputs."
    model, content = sequential((28, 28), layers.Flatten(), *[DenseMML(96, "relu", norm_gain=bool(i % 2)) for i in range(3)], DenseMML(10))
    loaded = runtime.load(content)
    assert [node.operation for node in loaded.program.graph.nodes] == ["Chain"] and loaded.fast
    x = np.random.normal(size=(1200, 28, 28)).astype("float32")
    x[3], x[5, 2, 2], x[7, 0, 0] = 0, np.nan, np.inf
    for rows in (1, 2, 6, 100, 1200):
        np.testing.assert_array_equal(model.predict(x[:rows], batch_size=1200, verbose=0), loaded(x[:rows]))
    assert np.isnan(loaded(x)[[5, 7]]).all() and np.isfinite(np.delete(loaded(x), [5, 7], axis=0)).all()


def test_a_convolution_rounds_as_keras_does():
    layer = Conv2DMML(4, 3)
    x = np.random.normal(size=(64, 14, 14, 8)).astype("float32")
    model, content = sequential((14, 14, 8), layer)
    from keras_mml.normalization import rms_normalize
    rows = x.reshape(64, -1)
    q, scale = (ops.convert_to_numpy(v) for v in layer.activation_quantizer.quantize(rms_normalize(rows)))
    ours, our_scale = kernels.quantize_rows(rows, None, True, 8)
    assert (q != ours).mean() < 1e-4 and np.abs(q - ours).max() <= 1
    np.testing.assert_allclose(scale, our_scale, rtol=1e-6)


@pytest.mark.any_backend
@pytest.mark.parametrize("x", [(99 + PIXELS * 9).astype("uint8"), PIXELS[..., None], PIXELS.T.copy().T, []], ids=["uint8", "rank", "order", "empty"])
def test_inputs_of_other_kinds(x):
    _, content = sequential((4, 4), layers.Flatten(), DenseMML(5), DenseMML(2, "softmax"))
    model = runtime.load(content)
    x = np.asarray(x).reshape(-1, 4, 4) if len(x) == 0 else x
    expected = model(np.ascontiguousarray(x, dtype="float32").reshape(len(x), 4, 4).copy())
    for given in (x, x.tolist() if len(x) else x, np.asarray(x, "float32")[:]):
        np.testing.assert_array_equal(model(given), expected)
    frozen = np.array(x, "float32").reshape(len(x), 4, 4)
    frozen.flags.writeable = False
    np.testing.assert_array_equal(model(frozen), expected)
    np.testing.assert_array_equal(model.predict(frozen, batch_size=2), expected)


@pytest.mark.any_backend
def test_inputs_of_another_shape_are_an_error():
    for part in (layers.Flatten(), layers.ReLU()):
        model = runtime.load(sequential((4, 4), part, DenseMML(5))[1])
        for shape in ((4,), (3, 4), (3, 16), (3, 2, 8), (3, 4, 4, 2), ()):
            with pytest.raises(ValueError, match=r"Input .* should have"):
                model(np.zeros(shape, "float32"))
    with pytest.raises(ValueError, match="should be numbers"):
        model(["a"])


def test_a_list_of_one_input_takes_an_array():
    inputs = keras.Input((6,))
    model, content = saved(keras.Model([inputs], [DenseMML(3)(inputs)]))
    x = np.random.normal(size=(4, 6)).astype("float32")
    assert np.array_equal(np.squeeze(runtime.load(content)(x)), np.squeeze(runtime.load(content)([x])))


def test_a_model_inside_with_several_inputs():
    first, second = keras.Input((4,)), keras.Input((4,))
    inside = keras.Model([first, second], layers.Add()([first, DenseMML(4)(second)]))
    a, b = keras.Input((4,)), keras.Input((4,))
    model, content = saved(keras.Model([a, b], DenseMML(2)(inside([a, b]))))
    x = [np.random.normal(size=(5, 4)).astype("float32") for _ in range(2)]
    assert np.abs(runtime.load(content)(x) - ops.convert_to_numpy(model(x))).max() < 1e-5


@pytest.mark.any_backend
def test_batches_are_for_one_input_and_one_output():
    inputs = keras.Input((6,))
    _, content = saved(keras.Model(inputs, [DenseMML(3)(inputs), DenseMML(2)(inputs)]))
    with pytest.raises(ValueError, match="one input and one output. Received: batch_size=2"):
        runtime.load(content).predict(np.zeros((4, 6), "float32"), batch_size=2)
    _, content = sequential((6,), DenseMML(3))
    for size in (0, -1, 1.5):
        with pytest.raises(ValueError, match="positive integer"):
            runtime.load(content).predict(np.zeros((4, 6), "float32"), batch_size=size)


@pytest.mark.any_backend
def test_means_that_depend_on_the_backend_are_refused():
    _, content = sequential((4, 1), layers.AveragePooling1D(3, 2, padding="same"), DenseMML(2))
    with pytest.raises(ValueError, match="backends of Keras disagree"):
        runtime.load(content)(np.zeros((1, 4, 1), "float32"))


def language_model(mixer="gru", positions=False):
    return sequential(
        (24,), TokenEmbedding(24, 30, 16, with_positions=positions), TransformerBlockMML(16, 32, 4, mixer=mixer), TransformerBlockMML(16, 32, 2, mixer=mixer, num_key_value_heads=1),
        RMSNorm(), DenseMML(30), dtype="int32",
    )  # fmt: skip


@pytest.mark.parametrize("mixer, positions", [("gru", False), ("gru", True), ("softmax", True)])
def test_a_language_model_writes_step_by_step(mixer, positions):
    model, content = language_model(mixer, positions)
    loaded = runtime.load(content)
    tokens = np.random.randint(0, 30, (200, 24)).astype("int32")
    whole = loaded(tokens)
    assert_rounded_alike(model.predict(tokens, verbose=0), whole)
    outputs, cache = loaded(tokens[:, :5], cache=loaded.get_initial_cache(200))
    sizes = set()
    for t in range(5, 24):
        step, cache = loaded(tokens[:, [t]], cache=cache)
        outputs = np.concatenate([outputs, step], axis=1)
        sizes.add(sum(part.nbytes for part in keras.tree.flatten(cache)))
    assert_rounded_alike(whole, outputs)
    assert len(sizes) == (1 if mixer == "gru" else 19)
    with pytest.raises(ValueError, match="tokens.*out of bounds"):
        loaded(np.full((1, 24), 30))


@pytest.mark.any_backend
def test_steps_need_layers_that_allow_them():
    model = runtime.load(sequential((6, 4), Conv1DMML(4, 2, padding="causal", name="looks_back"), GRUMML(4, return_sequences=True))[1])
    with pytest.raises(ValueError, match="cannot go step by step: a layer that has no cache"):
        model.get_initial_cache()


@pytest.mark.any_backend
def test_threads_share_a_model():
    _, content = sequential((30,), DenseMML(40, "relu"), DenseMML(20, "relu"), DenseMML(3))
    model = runtime.load(content)
    x = np.random.normal(size=(200, 30)).astype("float32")
    expected = model(x)
    with ThreadPoolExecutor(4) as pool:
        for i, y in enumerate(pool.map(lambda i: model(x[i : i + 1]), list(range(200)) * 5)):
            np.testing.assert_array_equal(y[0], expected[i % 200])


# ── What it refuses ─────────────────────────────────────────────────────────────────────────────────────────────────


@keras.saving.register_keras_serializable(package="somebody")
class Doubling(keras.layers.Layer):
    def call(self, x):
        return 2 * x


@pytest.mark.parametrize(
    "shape, dtype, part",
    [
        ((4,), "float32", lambda: Doubling()),
        ((4, 4), "float32", lambda: layers.LSTM(4)),
        ((4, 4), "float32", lambda: layers.Bidirectional(layers.GRU(3, return_sequences=True))),
        ((4,), "int32", lambda: TokenEmbedding(4, 9, 4, mask_zero=True)),
        ((4, 4), "float32", lambda: GRUMML(4, return_sequences=True, dtype="mixed_bfloat16")),
        ((4,), "float32", lambda: layers.Dense(4, activation=layers.PReLU())),
        ((4, 4), "float32", lambda: layers.BatchNormalization(axis=1)),
        ((4,), "float32", lambda: layers.Lambda(lambda x: ops.sin(x) + 1)),
        ((4, 4), "float32", lambda: layers.TimeDistributed(layers.Dense(2))),
    ],
)  # fmt: skip
def test_layers_of_anybody(shape, dtype, part):
    model, content = sequential(shape, part(), DenseMML(3), dtype=dtype)
    x = np.random.normal(size=(60, *shape)) if dtype == "float32" else np.random.randint(0, 9, (60, *shape))
    gaps = differences(model.predict(x.astype(dtype), verbose=0), runtime.load(content)(x))
    near = 0.02 if any("bfloat16" in layer.compute_dtype for layer in model.layers) else 1e-5  # NumPy computes it in float32
    assert (gaps > near).mean() <= 0.1 and gaps.max() < 0.05


@keras.saving.register_keras_serializable(package="somebody")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.head = DenseMML(2)

    def call(self, x):
        return ops.tanh(self.head(x)) * 2


@pytest.mark.any_backend
def test_a_subclassed_model():
    model = Subclassed()
    x = np.random.normal(size=(50, 4)).astype("float32")
    model(x)
    packed, content = saved(model)
    assert_rounded_alike(packed.predict(x, verbose=0), runtime.load(content)(x))


@pytest.mark.any_backend
def test_what_cannot_be_traced_is_said_when_it_is_loaded():
    _, content = sequential((4,), layers.Lambda(lambda x: x + keras.random.normal((4,)), name="noise"), DenseMML(3))
    with pytest.raises(ValueError, match="could not be written as a graph when it was saved. .* draw random numbers"):
        runtime.load(content)


@keras.saving.register_keras_serializable(package="somebody")
class Forgetful(layers.Layer):
    def call(self, x):
        return x

    def get_initial_cache(self, batch_size):
        raise RuntimeError("I keep none.")


@pytest.mark.any_backend
def test_a_model_is_saved_whatever_its_layers_raise():
    model, content = sequential((4, 4), Forgetful(), DenseMML(3))
    loaded, x = runtime.load(content), np.random.normal(size=(50, 4, 4)).astype("float32")
    assert_rounded_alike(model.predict(x, verbose=0), loaded(x))
    with pytest.raises(ValueError, match="I keep none"):
        loaded.get_initial_cache()


@pytest.mark.any_backend
@pytest.mark.parametrize("native", [True, False], ids=["C", "NumPy"])
def test_activations_behind_a_packed_layer(native, monkeypatch):
    x = np.random.normal(size=(60, 6)).astype("float32")
    kinds = [layers.Activation(name) for name in ("relu", "sigmoid", "tanh", "silu", "gelu", "softmax", "elu")]
    for part in (*kinds, layers.ReLU(max_value=0.0), layers.ReLU(max_value=0.5), layers.ReLU(negative_slope=0.1), layers.ReLU(threshold=0.2)):
        model, content = sequential((6,), DenseMML(8), part, DenseMML(3))
        with monkeypatch.context() as patched:
            if not native:
                patched.setattr(kernels, "native", lambda: None)
            assert_rounded_alike(model.predict(x, verbose=0), runtime.load(content)(x))


@pytest.mark.any_backend
def test_files_from_before_there_were_graphs():
    parts = parts_of(sequential((4,), DenseMML(3))[1])
    with pytest.raises(ValueError, match="saved by an earlier version of keras_mml. Load it with Keras"):
        runtime.load(rebuilt({name: data for name, data in parts.items() if "graph" not in name}))
    with pytest.raises(ValueError, match="A later version of keras_mml wrote it. Received: version=2"):
        runtime.load(described(parts, lambda description: description | {"version": 2}))


@pytest.mark.any_backend
def test_foreign_files(tmp_path):
    model, content = sequential((4,), DenseMML(3, name="ternary"))
    unpacked = sequential((4,), DenseMML(3, name="ternary"), packed=False)[1]
    model.save_weights(tmp_path / "a.weights.h5")
    bare = io.BytesIO()
    with zipfile.ZipFile(bare, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    files = {
        "unpacked.keras": (unpacked, "It does not say what the model computes: the model has no packed layers"), "empty.keras": (b"", "It is empty"),
        "text.keras": (b"hello " * 99, "no Keras file"), "weights.keras": ((tmp_path / "a.weights.h5").read_bytes(), "an HDF5 file"),
        "archive.keras": (bare.getvalue(), "has no 'model.weights.h5'"), "half.keras": (content[: len(content) // 2], "cannot be loaded"),
    }  # fmt: skip
    for name, (data, message) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}' cannot be loaded. .*{message}" if message != "cannot be loaded" else message):
            runtime.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        runtime.load(tmp_path / "missing.keras")
    with pytest.raises(ValueError, match="is a folder"):
        runtime.load(tmp_path)
    (tmp_path / "good.keras").write_bytes(content)
    with open(tmp_path / "good.keras", "rb") as file:
        assert runtime.load(file)(np.ones((1, 4), "float32")).shape == (1, 3)


def rebuilt(parts, **options):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return file.getvalue()


def parts_of(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


GRAPH = "graph.zip"


def described(parts, change):
    "The file with another description, which a function makes of the one it has."
    return written(parts, lambda text: json.dumps(change(json.loads(text))).encode())


def written(parts, change):
    "The file with another text of the description."
    (name,) = (name for name in parts if name.endswith(GRAPH))
    inner = parts_of(parts[name])
    return rebuilt({**parts, name: rebuilt({**inner, "description.json": change(inner["description.json"])})})


def test_a_layer_with_a_second_input():
    sequences, state = keras.Input((5, 4)), keras.Input((6,))
    model, content = saved(keras.Model([sequences, state], GRUMML(6)(sequences, initial_state=state)))
    x = [np.random.normal(size=(50, *size)).astype("float32") for size in ((5, 4), (6,))]
    assert_rounded_alike(model.predict(x, verbose=0), runtime.load(content)(x))


@pytest.mark.any_backend
def test_a_repacked_archive_loads_and_a_bomb_does_not():
    _, content = sequential((4,), DenseMML(3))
    assert runtime.load(rebuilt(parts_of(content), compression=zipfile.ZIP_DEFLATED)).name
    for name in (name for name in parts_of(content) if name.endswith((GRAPH, ".h5"))):
        bomb = rebuilt({**parts_of(content), name: bytes(2**26)}, compression=zipfile.ZIP_DEFLATED)
        with pytest.raises(ValueError, match=f"'{name}' is not stored as Keras does"):
            runtime.load(bomb)
    inner = rebuilt({"description.json": bytes(2**26)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="'description.json' is not stored"):
        runtime.load(rebuilt({name: inner if name.endswith(GRAPH) else data for name, data in parts_of(content).items()}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        runtime.load(written(parts_of(content), lambda text: b"[" * 100_000))


@pytest.mark.any_backend
def test_no_size_in_a_file_is_believed():
    part = layers.ZeroPadding2D(1), layers.UpSampling2D(2), layers.MaxPooling2D(2, padding="same"), layers.Flatten(), DenseMML(3)
    parts = parts_of(sequential((4, 4, 2), *part)[1])
    for operation, argument, value in (("Pad", "pad_width", [[0, 0], [10**9, 10**9], [10**9, 10**9], [0, 0]]), ("Repeat", "repeats", 10**9),
                                       ("MaxPool", "pool_size", [10**5, 10**5]), ("MaxPool", "strides", [0, 0])):

        def enlarged(description, operation=operation, argument=argument, value=value):
            nodes = [node for node in description["graph"]["nodes"] if node[0] == operation] if "graph" in description else []
            for node in nodes:
                node[1]["dict"][argument] = value
            return description

        assert f'["{operation}"'.encode() in parts_of(next(parts[name] for name in parts if name.endswith(GRAPH)))["description.json"]
        tracemalloc.start()
        with pytest.raises(ValueError):
            runtime.load(described(parts, enlarged))(np.ones((1, 4, 4, 2), "float32"))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        tracemalloc.stop()


# ── Damaged files ──────────────────────────────────────────────────────────────────────────────────────

STRANGE = [None, True, -1, 0, 1, 2, 3, 10**9, 2**63, -(2**70), 0.5, 1e999, float("nan"), "", "relu", "linear", "Dense", "PackedLinear", "%", "../x", [], {}, [[]], [None, 3]]


def leaves(tree, found=None):
    "Every place in a JSON tree: its container and its key."
    found = [] if found is None else found
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        found.append((tree, key))
        if isinstance(tree[key], (dict, list)):
            leaves(tree[key], found)
    return found


def flipped(data, rng, used=None):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.choice(used) if used is not None else rng.randrange(len(data))
        data[at] = rng.choice([0, 255, data[at] ^ 1 << rng.randrange(8), rng.randrange(256)])
    return bytes(data)


def damaged(content, parts, used, rng):
    "A file like this one with something wrong with it, mostly behind checksums that are right again."
    kind = rng.choice(["bytes", "cut", "description bytes", "description", "description", "weights", "weights", "weights cut"])
    if kind == "bytes":
        return flipped(content, rng)
    if kind == "cut":
        return content[: rng.randrange(len(content))]
    if kind == "description bytes":
        seed = rng.random()
        return written(parts, lambda text: flipped(text, random.Random(seed)))
    if kind == "weights":
        return rebuilt({**parts, "model.weights.h5": flipped(parts["model.weights.h5"], rng, used)})
    if kind == "weights cut":
        return rebuilt({**parts, "model.weights.h5": parts["model.weights.h5"][: rng.randrange(len(parts["model.weights.h5"]))]})
    seed = rng.random()
    return described(parts, lambda description: strange(description, random.Random(seed)))


def strange(description, rng):
    "A description with some values in other places, missing, or others."
    for _ in range(rng.choice([1, 1, 2, 4])):
        places = leaves(description)
        if not places:
            break
        container, key = rng.choice(places)
        action = rng.randrange(4)
        if action == 0:
            del container[key]
        elif action == 1:
            container[key] = rng.choice(STRANGE)
        elif action == 2 and type(container[key]) is int:
            container[key] += rng.choice([-1, 1, 7])
        else:
            other, other_key = rng.choice(places)
            container[key] = json.loads(json.dumps(other[other_key]))
    return description


@pytest.mark.any_backend
@pytest.mark.parametrize("number_of_files", lengths(500, 10_000))
def test_damaged_files(number_of_files, seed=0):
    "Each is a ValueError, while it is loaded or when it is called, or a model whose outputs are arrays."
    tiny = [
        (sequential((2, 2), layers.Rescaling(0.5), layers.Flatten(), DenseMML(3, "relu"), layers.Dense(2), DenseMML(2, "softmax"))[1], np.ones((2, 2, 2), "float32")),
        (sequential((4, 4, 2), Conv2DMML(3, 2, padding="same"), layers.MaxPooling2D(2), layers.BatchNormalization(), layers.Flatten(), DenseMML(2))[1], np.ones((1, 4, 4, 2), "float32")),
        (sequential((4,), TokenEmbedding(4, 5, 4), TransformerBlockMML(4, 4, 2), RMSNorm(), DenseMML(5), dtype="int32")[1], np.ones((1, 4), "int32")),
    ]  # fmt: skip
    a = keras.Input((3,))
    x = DenseMML(3)(a)
    tiny.append((saved(keras.Model(a, DenseMML(2)(layers.Concatenate()([x, x * 2.0, layers.Add()([a, x])]))))[1], np.ones((2, 3), "float32")))
    sources = []
    for content, x in tiny:
        parts = parts_of(content)
        sources.append((content, parts, np.flatnonzero(np.frombuffer(parts["model.weights.h5"], np.uint8)).tolist(), x))
        assert runtime.load(content)(x).shape
    rng, outcomes, start = random.Random(seed), {"refused by load": 0, "refused when called": 0, "predicted": 0}, time.time()
    for number in range(number_of_files):
        content, parts, used, x = sources[number % len(sources)]
        file = damaged(content, parts, used, rng)
        try:
            model = runtime.load(file)
        except ValueError as error:
            assert "cannot be loaded" in str(error)
            outcomes["refused by load"] += 1
            continue
        try:
            outputs = model(x)
            assert all(isinstance(y, np.ndarray) and y.size < 10_000 for y in keras.tree.flatten(outputs)), number
            outcomes["predicted"] += 1
        except ValueError:
            outcomes["refused when called"] += 1
    print(f"{sum(outcomes.values()):,} damaged files in {time.time() - start:.0f} s: {outcomes}")
    assert sum(outcomes.values()) == number_of_files and min(outcomes.values()) > number_of_files // 500


# ── Without Keras ───────────────────────────────────────────────────────────────────────────────────────────────────

ALONE = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("keras", "torch", "jax", "tensorflow", "h5py", "rich", "absl"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in ("keras", "torch", "jax", "tensorflow", "h5py"):
    sys.modules[name] = None
sys.meta_path.insert(0, Missing())
import numpy as np
import keras_mml
from keras_mml import runtime
model = runtime.load(sys.argv[1])
np.save(sys.argv[2], model(np.load(sys.argv[3])))
for name in ("pack", "layers", "summary"):
    try:
        getattr(keras_mml, name)
        raise SystemExit(f"keras_mml.{name} exists")
    except ImportError as error:
        assert f"`keras_mml.{name}` needs Keras" in str(error) and "pip install" in str(error)
assert not hasattr(keras_mml, "nothing")
print(sorted(set(sys.modules) & {"keras", "torch", "h5py"} - {n for n in sys.modules if sys.modules[n] is None}))
"""


@pytest.mark.any_backend
def test_it_needs_no_keras(tmp_path):
    model, content = sequential((6,), DenseMML(8, "relu"), DenseMML(3))
    x = np.random.normal(size=(5, 6)).astype("float32")
    (tmp_path / "model.keras").write_bytes(content)
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-c", ALONE, *(str(tmp_path / name) for name in ("model.keras", "y.npy", "x.npy"))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), model.predict(x, verbose=0))


def test_a_copy_has_memory_of_its_own():
    model, content = sequential((6,), DenseMML(70, "relu"), DenseMML(3))
    x = np.random.normal(size=(5, 6)).astype("float32")
    loaded = runtime.load(content)
    expected, twin = loaded(x), copy.deepcopy(loaded)
    (mine,), (theirs,) = ([rows.chain.table for rows in model.program.rows.values()] for model in (loaded, twin))
    assert twin.fast and not np.intersect1d(mine[:, 3:5], theirs[:, 3:5]).size
    del loaded
    np.testing.assert_array_equal(twin(x), expected)


def test_inputs_that_are_whole_numbers_are_cut_also_where_one_call_does_all():
    _, content = sequential((4,), DenseMML(3), dtype="int32")
    loaded, x = runtime.load(content), np.array([[1.7, 2.6, -3.9, 0.9]], "float32")
    np.testing.assert_array_equal(loaded(x), loaded(x.astype("int32")))


@pytest.mark.any_backend
def test_without_the_library_numpy_computes_the_same(monkeypatch):
    _, content = sequential((6,), DenseMML(8, "relu"), DenseMML(3))
    x = np.random.normal(size=(5, 6)).astype("float32")
    expected = runtime.load(content)(x)
    monkeypatch.setattr(kernels, "native", lambda: None)
    model = runtime.load(content)
    assert model.fast is None
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)


# ── Files of others ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", [keras.Sequential, lambda: keras.Sequential([keras.Input((4,)), layers.Dense(2)])])
def test_models_without_packed_layers_are_refused(make, tmp_path):
    make().save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="model.keras' cannot be loaded. .* has no packed layers"):
        runtime.load(tmp_path / "model.keras")


@pytest.mark.parametrize("text", [b"", b"null", b"[1]", b'"a"', b"{}", b'{"version": 1}', b'{"version": 1, "layers": {}, "name": "a", "graph": 3}'])
def test_what_python_says_of_a_description_is_put_into_words(text):
    parts = parts_of(sequential((4,), DenseMML(3))[1])
    with pytest.raises(ValueError, match="The file cannot be loaded. .*(is damaged|not a graph)"):
        runtime.load(written(parts, lambda _: text))


@pytest.mark.parametrize("file", [3, None, ["model.keras"]])
def test_what_is_no_file_is_named(file):
    with pytest.raises(ValueError, match="Expected a path, the bytes of a file, or an open file. Received: "):
        runtime.load(file)


def test_any_error_while_a_file_is_read_is_a_sentence(monkeypatch):
    content = sequential((4,), DenseMML(3))[1]
    for error, message in [(zlib.error("-3"), "damaged or incomplete"), (RuntimeError("encrypted"), "damaged or incomplete"), (EOFError(), "damaged or incomplete")]:

        def read(*args, error=error):
            raise error

        with monkeypatch.context() as patched, pytest.raises(ValueError, match=message):
            patched.setattr(zipfile.ZipFile, "read", read)
            runtime.load(content)
