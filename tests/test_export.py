"""ONNX files: the outputs of Keras in ONNX Runtime for every layer family, small, tidy, and clear errors without half-written files."""

import importlib.util
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
from cases import BACKEND, array, packable, ternary_cases
from keras import ops

import keras_mml
from keras_mml import pack
from keras_mml.layers import GRUMML, Conv2DMML, DenseMML, DepthwiseConv2DMML, SwiGLUMML, TokenEmbedding, TransformerBlockMML
from keras_mml.native.training import round_kernel

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("torch")

on_torch = pytest.mark.skipif(BACKEND != "torch", reason="The other backends hand the model to a process with torch, which one test does.")


def floats(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def export(model, path, **options):
    "A session for the file, which is checked."
    keras_mml.export_onnx(model, path, **options)
    onnx.checker.check_model(path, full_check=True)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(session, *inputs):
    return session.run(None, {spec.name: x for spec, x in zip(session.get_inputs(), inputs, strict=True)})


def assert_same(outputs, expected, tolerance=3e-5):
    "Equal but for rounding, and for the few activations that lie between two integers: with few rows, one of them may change most outputs."
    expected = array(expected)
    assert outputs.shape == expected.shape and outputs.dtype == "float32"
    difference, largest = np.abs(outputs - expected), np.abs(expected).max(initial=1e-3)
    assert difference.max() < 0.05 * largest
    assert len(outputs) < 9 or np.mean(difference <= tolerance * largest) > 0.8


@pytest.fixture(autouse=True)
def the_same_weights_in_every_run():
    keras.utils.set_random_seed(0)


def nodes(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@on_torch
@ternary_cases
def test_every_family_gives_the_outputs_of_keras_for_any_batch(case, tmp_path):
    x = case.input()
    model = keras.Model(x, case.apply(case.make(), x))
    for layer in packable(model):
        if layer.bias is not None:
            layer.bias.assign(floats(*layer.bias.shape))
    session, packed = export(model, tmp_path / "model.onnx"), pack(model)  # from the latent model
    for rows in (1, 3, 17):
        data = case.data(rows, seed=rows)
        assert_same(run(session, data)[0], packed(data))
    products = sum(getattr(layer, "has_full_rows", True) for layer in packable(model))
    assert nodes(tmp_path / "model.onnx").count("MatMulNBits") >= products
    content = (tmp_path / "model.onnx").read_bytes()
    secrets = (b"site-packages", b"torch", b"def forward", str(Path(keras_mml.__file__).parent).encode(), os.getcwd().encode())
    assert not any(secret in content for secret in secrets)


@on_torch
def test_packed_and_latent_models_give_the_same_file(tmp_path):
    model = keras.Sequential([keras.Input((40,)), DenseMML(33, activation="relu"), DenseMML(3)], name="same")
    for name, m in (("latent", model), ("packed", pack(model))):
        keras_mml.export_onnx(m, tmp_path / name)
    assert (tmp_path / "latent").read_bytes() == (tmp_path / "packed").read_bytes()
    assert not any(layer.packed for layer in model.layers)


@on_torch
@pytest.mark.parametrize("dim, exact", [(1, True), (31, True), (32, True), (127, True), (128, True), (300, True), (1, False), (129, False)])
def test_weights_are_2_bits_with_zero_point_1_and_the_scale_of_the_layer(dim, exact, tmp_path):
    layer = DenseMML(5, scale="channel" if dim % 2 else "tensor", norm=None)
    model = keras.Sequential([keras.Input((dim,)), layer])
    session = export(model, tmp_path / "model.onnx", exact=exact)
    x = floats(9, dim)
    tolerance = 1e-5 if exact else 0.02
    np.testing.assert_allclose(run(session, x)[0], array(pack(model)(x)), atol=tolerance * 9, rtol=0)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    graph = onnx.load(tmp_path / "optimized.onnx").graph  # what does not depend on the inputs is computed
    (node,) = [node for node in graph.node if node.op_type == "MatMulNBits"]
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights, scales, zeros = (stored[name] for name in node.input[1:])
    settings = {attribute.name: attribute.i for attribute in node.attribute}
    assert settings["bits"] == 2 and settings["N"] == 5 and settings["block_size"] in (32, 64, 128) and settings["accuracy_level"] == 4
    assert (zeros == 0b01010101).all()
    _, gamma = round_kernel(layer)
    assert (scales == np.broadcast_to(np.asarray(gamma).reshape(-1, 1), scales.shape)).all()
    codes = np.stack([weights >> shift & 3 for shift in (0, 2, 4, 6)], -1).reshape(5, -1)
    trits = layer.pack().ternary_state()["trits"]
    assert (codes <= 2).all() and sorted(codes[codes != 1]) == sorted((trits + 1)[trits != 0].tolist())


@on_torch
@pytest.mark.parametrize("bits, norm, gain", [(8, "rms", False), (4, "rms", True), (2, None, False)])
def test_arguments_of_the_rounding(bits, norm, gain, tmp_path):
    layer = DenseMML(70, norm=norm, norm_gain=gain, activation_bits=bits, bias_initializer="random_normal")
    model = keras.Sequential([keras.Input((6, 200)), layer])
    if gain:
        layer.gain.assign(np.linspace(0.5, 2, 200))
    tolerance = 1e-5 if bits == 8 else 1e-4  # beside few levels, the guards weigh more
    assert_same(run(export(model, tmp_path / "m"), floats(9, 6, 200))[0], pack(model)(floats(9, 6, 200)), tolerance)


@on_torch
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("norm", ["rms", None])
def test_zeros_and_numbers_that_are_not_finite(norm, seed, tmp_path):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((200,)), DenseMML(3, norm=norm, bias_initializer="random_normal")])
    x = floats(7, 200)
    x[0], x[1] = 0, 1e-12
    x[2, 0] = x[3, 150] = np.nan
    x[4, 0], x[5, 150] = np.inf, -np.inf
    outputs, expected = run(export(model, tmp_path / "m"), x)[0], array(pack(model)(x))
    np.testing.assert_array_equal(np.isnan(outputs), np.isnan(expected))
    np.testing.assert_allclose(outputs, expected, atol=1e-4)


def weights_of(model):
    "Bytes of the weights: 2 bits for a trit, 4 bytes for a number, one scale where all are equal."
    layers = packable(model)
    theirs = {id(weight) for layer in layers for weight in layer.weights}
    total = sum(4 * math.prod(weight.shape) for weight in model.weights if id(weight) not in theirs)
    for layer in layers:
        state = layer.ternary_state()
        trits, scale = state.pop("trits"), state.pop("kernel_scale")
        total += -(-trits.size // 4) + 4 * (np.unique(scale).size + sum(vector.size for vector in state.values()))
    return total


@on_torch
def test_files_are_as_small_as_the_weights(tmp_path):
    dense = [keras.Input((784,)), DenseMML(256), DenseMML(256, scale="channel"), keras.layers.Dense(10)]
    tokens = [keras.Input((16,), dtype="int32"), TokenEmbedding(16, 50, 128), SwiGLUMML(128)]
    images = [keras.Input((8, 8, 64)), DepthwiseConv2DMML(3), Conv2DMML(256, 3), Conv2DMML(128, 3, groups=2)]
    for layers in (dense, tokens, images):
        model = keras.Sequential(layers)
        for weight in model.weights:
            if weight.name == "bias":  # equal vectors would be stored once
                weight.assign(floats(*weight.shape))
        keras_mml.export_onnx(model, tmp_path / "model.onnx")
        assert (tmp_path / "model.onnx").stat().st_size <= 1.15 * weights_of(pack(model))


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [DenseMML(16, activation="relu"), DenseMML(4)]

    def call(self, x):
        return self.parts[1](self.parts[0](x))


@on_torch
def test_subclassed_models(tmp_path):
    model = Subclassed()
    with pytest.raises(ValueError, match="has no weights to export yet"):
        keras_mml.export_onnx(model, tmp_path / "m")
    model(floats(1, 8))
    assert_same(run(export(model, tmp_path / "m"), floats(9, 8))[0], pack(model)(floats(9, 8)))
    inputs = keras.Input((8,), name="x")
    wrapped = keras.Model({"x": inputs}, {"b": model(inputs), "a": DenseMML(2)(inputs)})
    session = export(wrapped, tmp_path / "m")
    assert [spec.name for spec in session.get_outputs()] == ["a", "b"] and session.get_inputs()[0].name == "x"
    assert_same(run(session, floats(9, 8))[1], pack(model)(floats(9, 8)))


@on_torch
def test_several_inputs_and_outputs_and_a_shared_layer(tmp_path):
    left, right = keras.Input((20,), name="left"), keras.Input((20,), name="right")
    shared = DenseMML(30)
    model = keras.Model([left, right], [shared(left) + shared(right), keras.layers.Dense(3)(left), right])
    session, packed = export(model, tmp_path / "model.onnx"), pack(model)
    x = [floats(9, 20, seed=1), floats(9, 20, seed=2)]
    for got, wanted in zip(run(session, *x), packed(x), strict=True):
        assert_same(got, wanted)
    assert [spec.name for spec in session.get_inputs()] == ["left", "right"]
    assert [spec.name for spec in session.get_outputs()] == ["output_0", "output_1", "output_2"]
    assert nodes(tmp_path / "model.onnx").count("MatMulNBits") == 2
    weights = [tensor for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer if tensor.name.endswith(".weights")]
    assert len(weights) == 1 and list(weights[0].dims) == [30, 5]


@on_torch
def test_sizes_that_are_open(tmp_path):
    images = [Conv2DMML(5, 3, padding="same", strides=2), keras.layers.GlobalAveragePooling2D(), DenseMML(3)]
    model = keras.Sequential([keras.Input((None, None, 4)), *images])
    session, packed = export(model, tmp_path / "m"), pack(model)
    for shape in [(1, 33, 20, 4), (2, 8, 9, 4)]:
        assert_same(run(session, floats(*shape))[0], packed(floats(*shape)))
    block = TransformerBlockMML(embedding_dim=8, ffn_dim=16, num_heads=2, mixer="softmax", rate=0.0)
    model = keras.Sequential([keras.Input((None, 8)), block])
    session, packed = export(model, tmp_path / "m"), pack(model)
    for shape in [(1, 50, 8), (2, 5, 8)]:
        assert_same(run(session, floats(*shape))[0], packed(floats(*shape)))


@on_torch
def test_masks_and_layers_of_keras(tmp_path):
    tokens = TokenEmbedding(max_len=8, vocab_size=11, embedding_dim=8, mask_zero=True)
    normal = [keras.layers.BatchNormalization(), keras.layers.Dropout(0.5), DenseMML(3, activation="softmax")]
    model = keras.Sequential([keras.Input((4,), dtype="int32"), tokens, GRUMML(6), *normal])
    x = np.random.default_rng(0).integers(0, 11, (9, 4)).astype("int32")
    assert_same(run(export(model, tmp_path / "m"), x)[0], pack(model)(x))


@on_torch
@pytest.mark.parametrize("policy", ["mixed_float16", "bfloat16"])
def test_half_precision_becomes_float32(policy, tmp_path):
    layers = [DenseMML(16, activation="relu", dtype=policy), keras.layers.Dense(8, dtype=policy), DenseMML(3, dtype=policy)]
    model = keras.Sequential([keras.Input((20,)), *layers])
    assert_same(run(export(model, tmp_path / "m"), floats(9, 20))[0], pack(model)(floats(9, 20)), tolerance=0.03)
    assert [layer.compute_dtype for layer in layers] == [keras.DTypePolicy(policy).compute_dtype] * 3


def refused(tmp_path, model, message, error=ValueError):
    path = tmp_path / "refused.onnx"
    path.write_text("what was there")
    with pytest.raises(error, match=message):
        keras_mml.export_onnx(model, path)
    assert path.read_text() == "what was there" and [p.name for p in tmp_path.iterdir()] == ["refused.onnx"]


LAMBDAS = [
    (lambda x: ops.convert_to_tensor(ops.convert_to_numpy(x)), "'step' cannot be exported: torch cannot capture"),
    (lambda x: x if float(ops.sum(x)) > 0 else -x, "'step' cannot be exported: .* values in a tensor"),
    (lambda x: ops.qr(x)[0], "'step' cannot be exported: ONNX has no counterpart"),
    (lambda x: ops.reshape(x, (3, 64)), "'step' cannot be exported: .* one size of the batch"),
    (lambda x: x if x.shape[0] < 9 else -x, "'step' cannot be exported: .* one size of the batch"),
]


@on_torch
@pytest.mark.parametrize("function, message", LAMBDAS, ids=["numpy", "branch", "operator", "batch", "size"])
def test_what_cannot_be_expressed_names_its_layer_and_writes_nothing(function, message, tmp_path):
    layer = keras.layers.Lambda(function, output_shape=(8, 8), name="step")
    refused(tmp_path, keras.Sequential([keras.Input((8, 8)), DenseMML(8), layer]), message)


@on_torch
@pytest.mark.parametrize("exact", [True, False])
def test_layers_with_equal_trits_keep_their_own_scales_and_shapes(exact, tmp_path):
    x = floats(20, 8)
    inputs = keras.Input((8,))
    first, second, narrow, short = DenseMML(4), DenseMML(4), DenseMML(3), DenseMML(4)
    outputs = [first(inputs), second(inputs), narrow(inputs), short(inputs[:, :7])]
    kernel = np.sign(floats(8, 4, seed=1))
    kernel[7] = kernel[:, 3] = 0  # so that the packed bytes of all four are equal
    for factor, layer in enumerate((first, second, narrow, short), start=1):
        layer.kernel.assign(factor * kernel[: layer.kernel.shape[0], : layer.units])
    model = keras.Model(inputs, outputs)
    for output, expected in zip(run(export(model, tmp_path / "model.onnx", exact=exact), x), pack(model)(x), strict=True):
        assert_same(output, expected, tolerance=3e-5 if exact else 0.02)


@on_torch
def test_few_bits_lose_nothing(tmp_path):
    "Whole numbers in, sums of them out."
    for dim in (5, 20, 65, 200, 784):
        layer = DenseMML(8, activation_bits=2, norm=None, use_bias=False)
        model = keras.Sequential([keras.Input((dim,)), layer])
        x = np.random.default_rng(0).integers(-1, 2, (50, dim)).astype("float32")
        sums = run(export(model, tmp_path / "model.onnx"), x)[0] / np.abs(array(layer.kernel)).mean()
        assert np.abs(sums - np.round(sums)).max() < 2e-3


@on_torch
def test_inputs_and_outputs_of_any_name(tmp_path):
    x, y = floats(5, 4), floats(5, 4, seed=1)
    first, second = keras.Input((4,), name="_0"), keras.Input((4,), name="_w0")
    model = keras.Model([first, second], [DenseMML(3)(first), DenseMML(2)(second)])
    for output, expected in zip(run(export(model, tmp_path / "a.onnx"), x, y), pack(model)([x, y]), strict=True):
        assert_same(output, expected)
    inputs = keras.Input((4,), name="x")
    session = export(keras.Model({"x": inputs}, {"x": DenseMML(3)(inputs)}), tmp_path / "b.onnx")
    assert ([i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]) == (["x"], ["x_output"])


@on_torch
def test_other_threads_notice_nothing(tmp_path):
    model, x = pack(keras.Sequential([keras.Input((16,)), DenseMML(8), DenseMML(4)])), floats(3, 16)
    expected, wrong, done = array(model(x)), [], threading.Event()

    def predict():
        while not done.is_set():
            try:
                wrong.extend([] if np.array_equal(array(model(x)), expected) else ["other numbers"])
            except Exception as error:
                wrong.append(repr(error))

    thread = threading.Thread(target=predict)
    thread.start()
    try:
        keras_mml.export_onnx(model, tmp_path / "model.onnx")
    finally:
        done.set()
        thread.join()
    assert not wrong, (len(wrong), wrong[:3])


@on_torch
def test_errors(tmp_path):
    refused(tmp_path, DenseMML(3), "takes a Keras model. Received: <DenseMML")
    refused(tmp_path, "model", "takes a Keras model. Received: 'model' of type str")
    refused(tmp_path, keras.Sequential([DenseMML(3)]), "has no weights to export yet")
    refused(tmp_path, keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]), "has no ternary layer. Keras exports it itself")
    stateful = keras.Sequential([keras.Input((5, 8), batch_size=3), GRUMML(4, stateful=True, name="memory")])
    refused(tmp_path, stateful, "'memory' .* keeps a state")
    refused(tmp_path, keras.Sequential([keras.Input((None, 8)), GRUMML(4, name="scan")]), "'scan' .* depends on axis 1 of input 'input'")
    model = keras.Sequential([keras.Input((3,)), DenseMML(2)])
    with pytest.raises(FileNotFoundError, match="does not exist. Received: path="):
        keras_mml.export_onnx(model, tmp_path / "no" / "model.onnx")
    (tmp_path / "refused.onnx").unlink()
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ValueError, match="Received a folder"):
        keras_mml.export_onnx(model, tmp_path / "folder.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.onnx"]


def test_missing_packages_are_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name.startswith("onnx") else find(name, *more))
    model = keras.Sequential([keras.Input((3,)), DenseMML(2)])
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        keras_mml.export_onnx(model, tmp_path / "model.onnx")


@pytest.mark.skipif(BACKEND == "torch", reason="For the other backends.")
def test_from_this_backend(tmp_path):
    model = keras.Sequential([keras.Input((20,)), DenseMML(30, activation="relu"), DenseMML(3)])
    assert_same(run(export(model, tmp_path / "m"), floats(9, 20))[0], pack(model)(floats(9, 20)))
    odd = keras.Sequential([keras.Input((20,)), DenseMML(30), keras.layers.Lambda(lambda x: 2 * x)])
    (tmp_path / "m").unlink()
    refused(tmp_path, odd, "handed to a process with torch")


FROM_JAX = """
import keras, keras_mml, numpy as np, sys
from keras_mml.layers import DenseMML

model = keras.Sequential([keras.Input((20,)), DenseMML(30, activation="relu"), DenseMML(3)])
keras_mml.export_onnx(model, "model.onnx")
np.save("expected.npy", keras_mml.pack(model).predict(np.load("x.npy"), verbose=0))
"""


@on_torch
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
def test_from_jax(tmp_path):
    x = floats(9, 20)
    np.save(tmp_path / "x.npy", x)
    paths = os.pathsep.join([str(Path(keras_mml.__file__).parent.parent), *sys.path])
    environment = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", FROM_JAX], cwd=tmp_path, env=environment, check=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert_same(run(session, x)[0], np.load(tmp_path / "expected.npy"))


@on_torch
def test_digits_are_read_as_well_as_in_keras(tmp_path):
    (x, y), (x_test, y_test) = keras_mml.datasets.load_mnist()
    x, x_test = (images.reshape(-1, 784).astype("float32") / 255 for images in (x[:2000], x_test))
    model = keras.Sequential([keras.Input((784,)), DenseMML(128, activation="relu"), DenseMML(10)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y[:2000], batch_size=50, epochs=1, verbose=0)
    classes = [outputs.argmax(1) for outputs in (run(export(model, tmp_path / "m"), x_test)[0], pack(model).predict(x_test, verbose=0))]
    assert (classes[1] == y_test).mean() > 0.7
    assert abs((classes[0] == y_test).mean() - (classes[1] == y_test).mean()) <= 0.001 and (classes[0] == classes[1]).mean() > 0.998


@on_torch
def test_threads_that_export_at_once_write_what_they_write_alone(tmp_path):
    models = [keras.Sequential([keras.Input((16 * n,)), DenseMML(8, activation="relu"), DenseMML(n + 1)], name=f"m{n}") for n in (1, 2, 3)]
    for n, model in enumerate(models):
        keras_mml.export_onnx(model, tmp_path / f"alone_{n}.onnx")
    before = keras.layers.Layer.__call__, keras.DTypePolicy.compute_dtype, torch_functions()
    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(lambda n: keras_mml.export_onnx(models[n], tmp_path / f"at_once_{n}.onnx"), range(len(models))))
    for n in range(len(models)):
        assert (tmp_path / f"at_once_{n}.onnx").read_bytes() == (tmp_path / f"alone_{n}.onnx").read_bytes()
    assert (keras.layers.Layer.__call__, keras.DTypePolicy.compute_dtype, torch_functions()) == before


def torch_functions():
    import torch

    from keras_mml.native import operators

    return torch.take_along_dim, operators._torch_on_device
