"""Packed layers and models: the same outputs, a smaller file, and clear errors, on every backend."""

import gc
import importlib.util
import json
import os
import subprocess
import sys
import weakref
import zipfile
import zlib
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from cases import BACKEND, FULL, array
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from keras_mml import pack, runtime
from keras_mml.layers import (
    GRUMML,
    Conv1DMML,
    Conv2DMML,
    DenseMML,
    MultiHeadAttentionMML,
    PatchEmbedding,
    RMSNorm,
    TokenEmbedding,
    TransformerBlockMML,
)
from keras_mml.native import kernels, operators
from keras_mml.native.kernels import ternary_linear
from keras_mml.native.operators import linear_on_device, packed_linear
from keras_mml.native.training import round_kernel
from keras_mml.packing import decode_state, encode_state, layer_sizes, pack_ternary, unpack_ternary
from keras_mml.quantizers import AbsmaxInt, StraightThroughQuantizer

ROOT = Path(__file__).resolve().parent.parent


def assert_same_within_rounding(packed, latent, step=0.0):
    "Equal up to float32 rounding but for the few inputs that lie on the edge between two integers."
    packed, latent = array(packed), array(latent)
    close = np.abs(packed - latent) <= 1e-5 + 1e-5 * np.abs(latent)
    assert close.mean() > 0.98 and np.abs(packed - latent).max() <= step + 1e-4 * np.abs(latent).max()


@pytest.mark.parametrize("scale", ["tensor", "channel"])
@pytest.mark.parametrize("norm", ["rms", "rms with gain", None])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_packed_layer_gives_the_outputs_of_the_training_graph(scale, norm, bits):
    arguments = dict(norm=norm and "rms", norm_gain=norm == "rms with gain", scale=scale, activation_bits=bits)
    layer = DenseMML(70, activation="gelu", bias_initializer="random_normal", **arguments)
    x = np.random.normal(size=(9, 5, 100)).astype("float32")
    layer(x)
    if layer.norm_gain:
        layer.gain.assign(np.random.uniform(0.5, 2, 100))
    before = [array(w) for w in layer.weights]
    packed = layer.pack()
    _, gamma = layer.kernel_quantizer.quantize(layer.kernel)
    largest = np.abs(array(layer.gain)).max() * 10 if layer.norm_gain else 10
    assert_same_within_rounding(packed(x), layer(x), step=largest / (2 ** (bits - 1) - 1) * float(np.max(array(gamma))))
    assert packed.packed and not layer.packed and all(np.array_equal(a, array(b)) for a, b in zip(before, layer.weights, strict=True))


def test_the_integers_are_those_of_numpy_on_every_path():
    layer = DenseMML(33, scale="channel")
    x = np.random.normal(size=(6, 50)).astype("float32")
    layer(x)
    packed = layer.pack()
    trits, gamma = round_kernel(layer)
    np.testing.assert_array_equal(unpack_ternary(ops.convert_to_numpy(packed.packed_kernel), (50, 33)), trits)
    expected = ternary_linear(x, pack_ternary(trits), 33, gamma.ravel(), array(layer.bias))
    np.testing.assert_array_equal(array(packed(x)), expected)
    whole = np.random.randint(-127, 128, (6, 50)).astype("float32")
    whole[:, 0] = 127
    arguments = (ops.convert_to_tensor(whole), packed.packed_kernel.value, ops.ones(33), None, None, 33, False, 8)
    for path in (packed_linear, linear_on_device):
        np.testing.assert_array_equal(array(path(*arguments)), whole @ trits)


def test_every_backend_has_taken_the_kernel_in_c(monkeypatch):
    "Through names of torch and tensorflow that are not all public: if they move, packed layers are computed by NumPy, and this fails."
    if kernels.native() is None:
        pytest.skip("the C library is not compiled")

    def refuse(*_, **__):
        raise AssertionError("NumPy was called")

    monkeypatch.setattr(operators, "_linear_of_arrays", refuse)
    trits, x = np.random.randint(-1, 2, (37, 21)), np.random.normal(size=(5, 37)).astype("float32")
    arguments = *map(ops.convert_to_tensor, (x, pack_ternary(trits), np.ones(21, np.float32))), None, None
    expected = ternary_linear(x, pack_ternary(trits), 21, np.ones(21, np.float32))
    np.testing.assert_array_equal(array(packed_linear(*arguments, 21)), expected)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        operators.tensorflow_operator.cache_clear()  # as where the module is loaded again: tensorflow ends a process that registers twice
        graph = tf.function(lambda x: packed_linear(x, *arguments[1:], 21))
        np.testing.assert_array_equal(array(graph(arguments[0])), expected)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [DenseMML(16, activation="relu"), RMSNorm()]
        self.heads = {"a": keras.Sequential([DenseMML(8), keras.layers.Dropout(0.5)]), "b": DenseMML(3)}

    def call(self, x, training=None):
        for block in self.blocks:
            x = block(x)
        return self.heads["b"](self.heads["a"](x, training=training))


@keras.saving.register_keras_serializable(package="tests")
class SavedSubclassed(Subclassed):
    def __init__(self, **kwargs):
        super().__init__()


@keras.saving.register_keras_serializable(package="tests")
class Residual(keras.layers.Layer):
    "A layer of layers, which makes them when it is built."

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.inner = None

    def build(self, input_shape):
        self.inner = DenseMML(self.units, activation="relu")
        self.inner.build(input_shape)

    def call(self, x):
        return x + self.inner(x)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def sequential():
    return keras.Sequential([keras.Input((4, 6)), DenseMML(16, activation="relu"), keras.layers.Flatten(), DenseMML(3)])


def functional():
    inputs = keras.Input((4, 6))
    shared = DenseMML(6, activation="relu")
    inner = keras.Sequential([keras.Input((4, 6)), DenseMML(6, norm_gain=True), keras.layers.Dense(6)])
    x = shared(inner(shared(inputs)))
    x = Residual(6)(x)
    x = keras.layers.TimeDistributed(DenseMML(5, use_bias=False))(x)
    x = keras.layers.Bidirectional(keras.layers.GRU(3))(x)
    return keras.Model(inputs, DenseMML(3)(x))


MODELS = [sequential, functional, Subclassed, SavedSubclassed]
INPUTS = np.random.default_rng(0).normal(size=(7, 4, 6)).astype("float32")


def trits_of(model):
    "Every ternary layer of a model, and whether it is packed."
    return [layer.packed for layer in model._flatten_layers() if isinstance(layer, DenseMML)]


@pytest.mark.parametrize("build", MODELS)
def test_models_of_every_kind_are_packed_and_left_alone(build):
    keras.utils.set_random_seed(0)
    model = build()
    model(INPUTS)
    for layer in model._flatten_layers():  # without a bias, a second layer would often see halves, which round either way
        if isinstance(layer, DenseMML) and layer.bias is not None:
            layer.bias.assign(np.random.normal(size=layer.units))
    before = array(model(INPUTS))
    weights = model.get_weights()
    packed = pack(model)
    assert all(trits_of(packed)) and not any(trits_of(model)) and len(trits_of(packed)) == len(trits_of(model))
    assert_same_within_rounding(packed(INPUTS), before, step=0.05)
    np.testing.assert_array_equal(array(model(INPUTS)), before)
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))
    assert type(packed) is type(model)


def test_shared_layers_stay_shared():
    packed = pack(functional())
    assert len(packed.layers) == len(functional().layers)
    assert len({id(w) for w in packed.weights}) == len(packed.weights) == len(pack(functional()).weights)


def test_a_model_packed_in_place_becomes_the_packed_one():
    model = Subclassed()
    model(INPUTS)
    expected = array(pack(model)(INPUTS))
    assert pack(model, in_place=True) is model and all(trits_of(model))
    np.testing.assert_array_equal(array(model(INPUTS)), expected)
    assert "kernel" not in {w.name for w in model.weights}


@pytest.mark.parametrize("build", [sequential, functional, SavedSubclassed])
def test_a_saved_model_predicts_the_same(build, tmp_path):
    model = build()
    model(INPUTS)
    packed = pack(model)
    expected = array(packed(INPUTS))
    packed.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert all(trits_of(loaded))
    np.testing.assert_array_equal(array(loaded(INPUTS)), expected)
    packed.save_weights(tmp_path / "m.weights.h5")
    for other in (pack(model), build()):  # into a packed model, and into one that becomes packed
        other(INPUTS)
        other.load_weights(tmp_path / "m.weights.h5")
        assert all(trits_of(other))
        np.testing.assert_array_equal(array(other(INPUTS)), expected)


def test_a_clone_of_a_packed_model_is_packed():
    packed = pack(functional_without_own_layers())
    clone = keras.models.clone_model(packed)
    assert all(trits_of(clone))
    clone.set_weights(packed.get_weights())
    np.testing.assert_array_equal(array(clone(INPUTS)), array(packed(INPUTS)))


def test_packed_models_can_be_called_symbolically():
    model = Subclassed()
    model(INPUTS)
    packed = pack(model)
    inputs = keras.Input((4, 6))
    outer = keras.Model(inputs, keras.layers.Flatten()(packed(inputs)))
    assert outer.output_shape == (None, 12)
    np.testing.assert_array_equal(array(outer(INPUTS)), array(packed(INPUTS)).reshape(7, 12))


def test_the_configuration_survives_a_round_trip():
    layer = sequential().layers[0].pack()
    config = json.loads(json.dumps(layer.get_config()))
    assert config["packed"] and DenseMML.from_config(config).get_config() == layer.get_config()


def test_the_file_holds_less_than_two_bits_a_weight(tmp_path):
    model = keras.Sequential([keras.Input((784,)), DenseMML(256), DenseMML(256), DenseMML(256), DenseMML(10)])
    model.save_weights(tmp_path / "float.weights.h5")
    model.compile(optimizer="adam", loss="mse", metrics=["mae"])
    pack(model).save(tmp_path / "packed.keras")
    ternary_part = 4 * sum(layer.kernel.shape[0] * layer.kernel.shape[1] for layer in model.layers)
    assert os.path.getsize(tmp_path / "packed.keras") < ternary_part / 14 < os.path.getsize(tmp_path / "float.weights.h5") / 14


def damaged(path, change):
    "Apply `change` to the first packed layer in a weights file."
    with h5py.File(path, "r+") as file:
        groups = []
        file.visititems(lambda name, item: groups.append(item) if isinstance(item, h5py.Group) and "packed" in item else None)
        change(groups[0])


def flip_a_bit(group):
    group["packed"][3] ^= 1


def change_the_bias(group):
    group["packed"][-6] ^= 1


def replace(group, content):
    del group["packed"]
    group["packed"] = content


def shorten(group):
    replace(group, group["packed"][:-1])


def empty(group):
    replace(group, np.zeros(0, np.uint8))


def other_type(group):
    replace(group, group["packed"][:].astype("float32"))


@pytest.mark.parametrize("change", [flip_a_bit, change_the_bias, shorten, empty, other_type])
def test_damaged_weights_are_refused_and_nothing_changes(change, tmp_path):
    layer = DenseMML(5, bias_initializer="ones")
    model = keras.Sequential([keras.Input((6,)), layer])
    pack(model).save_weights(tmp_path / "m.weights.h5")
    damaged(tmp_path / "m.weights.h5", change)
    for target in (model, pack(model)):
        before = target.get_weights()
        with pytest.raises(ValueError, match=f"packed weights of layer '{target.layers[0].name}' could not be loaded"):
            target.load_weights(tmp_path / "m.weights.h5")
        assert all(np.array_equal(a, b) for a, b in zip(before, target.get_weights(), strict=True))


def test_a_compiled_graph_does_not_go_on_with_the_old_weights(tmp_path):
    model = sequential()
    model.predict(INPUTS, verbose=0)
    other = pack(sequential())
    other.save_weights(tmp_path / "m.weights.h5")
    model.load_weights(tmp_path / "m.weights.h5")
    after = model.predict(INPUTS, verbose=0)
    assert np.isnan(after).all() or np.allclose(after, array(other(INPUTS)), rtol=1e-5, atol=1e-5)
    model = sequential()
    model.predict(INPUTS, verbose=0)
    pack(model, in_place=True)
    np.testing.assert_allclose(model.predict(INPUTS, verbose=0), array(model(INPUTS)), rtol=1e-5, atol=1e-5)


def not_registered(y, z):
    return ops.mean((y - z) ** 2)


def test_a_model_whose_compilation_cannot_be_repeated_is_packed_uncompiled():
    model = sequential()
    model.compile(loss=not_registered)
    with pytest.warns(UserWarning, match="is not compiled"):
        packed = pack(model)
    assert not packed.compiled


def test_arguments_of_the_operator_are_checked():
    packed = pack_ternary(np.zeros((64, 8)))
    x, scale = np.ones((2, 64), "float32"), np.ones(8, "float32")
    for wrong, message in [
        (dict(x=np.ones((2, 100), "float32")), "need packed weights of shape"),
        (dict(packed=packed.astype("int32")), "and dtype uint8"),
        (dict(scale=np.ones(3, "float32")), "`scale` must have shape"),
        (dict(bias=np.ones(3, "float32")), "`bias` must have shape"),
        (dict(gain=np.ones(3, "float32")), "`gain` must have shape"),
        (dict(bits=9), "expected an integer from 2 to 8, or 0. Received: bits=9"),
    ]:
        with pytest.raises(ValueError, match=message):
            packed_linear(**{**dict(x=x, packed=packed, scale=scale, bias=None, gain=None, units=8), **wrong})


def test_weights_that_do_not_fit_are_refused(tmp_path):
    def model(dim, units, **arguments):
        return keras.Sequential([keras.Input((dim,)), DenseMML(units, **arguments)])

    pack(model(6, 5)).save_weights(tmp_path / "packed.weights.h5")
    model(6, 5).save_weights(tmp_path / "latent.weights.h5")
    options = [dict(use_bias=False), dict(norm_gain=True), dict(activation_bits=4), dict(norm=None)]
    for other in (model(5, 6), *(model(6, 5, **o) for o in options)):
        with pytest.raises(ValueError, match="written by another layer than one with .'kernel'"):
            other.load_weights(tmp_path / "packed.weights.h5")
    with pytest.raises(ValueError, match="is packed, and the file has no packed weights"):
        pack(model(6, 5)).load_weights(tmp_path / "latent.weights.h5")


@pytest.mark.parametrize("keep", [0.2, 0.9])
def test_a_truncated_file_is_not_loaded(keep, tmp_path):
    model = pack(sequential())
    model.save(tmp_path / "m.keras"), model.save_weights(tmp_path / "m.weights.h5")
    for name in ("m.keras", "m.weights.h5"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(keep * len(content))])
    before = model.get_weights()
    with pytest.raises((ValueError, OSError, zipfile.BadZipFile)):
        keras.saving.load_model(tmp_path / "m.keras")
    with pytest.raises((ValueError, OSError)):
        model.load_weights(tmp_path / "m.weights.h5")
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


@pytest.mark.slow_to_compile
def test_a_model_loads_in_a_fresh_process_on_every_backend(tmp_path):
    packed = pack(functional_without_own_layers())
    packed.save(tmp_path / "m.keras")
    np.save(tmp_path / "x.npy", INPUTS)
    expected = array(packed(INPUTS))
    code = (
        "import sys, numpy as np, keras, keras_mml\n"
        "model = keras.saving.load_model(sys.argv[1] + '/m.keras')\n"
        "np.save(sys.argv[1] + '/y.npy', model.predict(np.load(sys.argv[1] + '/x.npy'), verbose=0))"
    )
    for backend in ("torch", "jax", "tensorflow"):
        if importlib.util.find_spec(backend) is None or backend == BACKEND and not FULL:  # which loaded models above
            continue
        environment = {**os.environ, "KERAS_BACKEND": backend}
        result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        assert_same_within_rounding(np.load(tmp_path / "y.npy"), expected, step=0.05)


def functional_without_own_layers():
    inputs = keras.Input((4, 6))
    shared = DenseMML(6, activation="relu")
    x = keras.layers.TimeDistributed(DenseMML(5))(shared(shared(inputs)))
    return keras.Model(inputs, DenseMML(3, scale="channel")(keras.layers.Flatten()(x)))


@keras.saving.register_keras_serializable(package="tests")
class Fractions(StraightThroughQuantizer):
    def quantize(self, x):
        return ops.clip(x, -1, 1), ops.ones(())

    def get_config(self):
        return {}


@keras.saving.register_keras_serializable(package="tests")
class ByInput(Fractions):
    "A scale for each input, which cannot be taken out of a sum."

    def quantize(self, x):
        return ops.sign(x), ops.mean(ops.abs(x), axis=1, keepdims=True)


class OtherRounding(AbsmaxInt):
    pass


class Unknown(keras.Model):
    "Keras cannot make it again: it has an argument and no `get_config`."

    def __init__(self, units):
        super().__init__()
        self.dense = DenseMML(units)

    def call(self, x):
        return self.dense(x)


def test_what_cannot_be_packed_says_why():
    x = np.ones((2, 6), "float32")

    def model(layer, build=True):
        return keras.Sequential([keras.Input((6,)), layer] if build else [layer])

    unknown = Unknown(3)
    unknown(x)
    for wrong, message in [
        (model(keras.layers.Dense(3)), "has no layer that can be packed"),
        (model(DenseMML(3), build=False), "Call '.*' on a batch first. Layers without weights: .'dense_mml"),
        (pack(model(DenseMML(3))), "is packed already"),
        (model(DenseMML(3, scale=Fractions())), "Layer 'dense_mml.*' cannot be packed. Only the values -1, 0 and 1"),
        (model(DenseMML(6, scale=ByInput())), "needs one scale, or one for each of its 6 outputs"),
        (model(DenseMML(3, activation_bits=OtherRounding())), "Layer 'dense_mml.*' cannot be packed: .*`AbsmaxInt`"),
        (unknown, "Implement the `get_config` of `Unknown`, or pack the model itself with `pack\\(model, in_place=True\\)`"),
        ("model.keras", "takes a Keras model or layer. Received: 'model.keras' of type str"),
    ]:
        with pytest.raises(ValueError, match=message):
            pack(wrong)
    assert pack(unknown, in_place=True).dense.packed
    with pytest.raises(ValueError, match="no weights to pack yet"):
        DenseMML(3).pack()
    with pytest.raises(ValueError, match="is packed already"):
        pack(DenseMML(3, packed=True))


def test_a_model_with_one_unpackable_layer_is_left_alone_in_place():
    model = keras.Sequential([keras.Input((6,)), DenseMML(3), DenseMML(3, scale=Fractions())])
    with pytest.raises(ValueError, match="cannot be packed"):
        pack(model)
    assert not any(trits_of(model))
    with pytest.raises(ValueError, match="cannot be packed"):
        pack(model, in_place=True)
    assert not any(trits_of(model))


def test_packed_models_evaluate_and_refuse_to_train(tmp_path):
    model = sequential()
    model.compile(optimizer="adam", loss="mse", metrics=["mae"])
    y = np.zeros((7, 3), "float32")
    model.fit(INPUTS, y, verbose=0)
    packed = pack(model)
    before, after = model.evaluate(INPUTS, y, verbose=0), packed.evaluate(INPUTS, y, verbose=0)
    np.testing.assert_allclose(before, after, rtol=1e-2)
    packed.save(tmp_path / "m.keras")
    np.testing.assert_allclose(keras.saving.load_model(tmp_path / "m.keras").evaluate(INPUTS, y, verbose=0), after, rtol=1e-5)
    np.testing.assert_allclose(packed.predict(INPUTS, verbose=0), array(packed(INPUTS)), rtol=1e-6, atol=1e-6)
    packed.compile(optimizer="adam", loss="mse")
    with pytest.raises(ValueError, match="is packed and cannot be trained"):
        packed.fit(INPUTS, y, verbose=0)
    model.fit(INPUTS, y, verbose=0)  # the original goes on


def test_predict_compiled_and_not():
    packed = pack(functional())
    expected = array(packed(INPUTS))
    for run_eagerly in (True, False):
        packed.compile(run_eagerly=run_eagerly)
        np.testing.assert_allclose(packed.predict(INPUTS, verbose=0), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16", "float64"])
def test_every_dtype_policy(dtype):
    layer = DenseMML(16, dtype=dtype, bias_initializer="random_normal")
    x = np.random.normal(size=(4, 64)).astype("float32")
    y = layer(x)
    packed = layer.pack()
    z = packed(x)
    assert keras.backend.standardize_dtype(z.dtype) == keras.backend.standardize_dtype(y.dtype)
    np.testing.assert_allclose(array(z), array(y), rtol=0.05, atol=0.05)


def test_empty_batches_masks_and_other_input_dtypes():
    layer = DenseMML(3)
    pixels = np.random.randint(0, 256, (5, 9))
    layer(pixels.astype("float32"))
    packed = layer.pack()
    assert tuple(packed(np.ones((0, 9), "float32")).shape) == (0, 3)
    assert tuple(packed(np.ones((2, 0, 9), "float32")).shape) == (2, 0, 3)
    outputs = [array(packed(pixels.astype(dtype))) for dtype in ("float32", "float64", "int32", "uint8")]
    assert all(np.array_equal(y, outputs[0]) for y in outputs)
    model = keras.Sequential([keras.layers.Embedding(10, 6, mask_zero=True), DenseMML(4)])
    tokens = np.array([[1, 2, 0]])
    model(tokens)
    np.testing.assert_array_equal(ops.convert_to_numpy(pack(model)(tokens)._keras_mask), [[True, True, False]])


def test_saving_a_packed_model_holds_no_latent_weights():
    packed = pack(sequential())
    assert all(w.dtype == "uint8" for w in packed.weights if w.name == "packed_kernel")
    assert not any(w.name == "kernel" for w in packed.weights) and not packed.trainable_weights


@pytest.mark.skipif(BACKEND != "torch", reason="the operator of torch")
class TestTorch:
    def packed(self):
        layer = DenseMML(33)
        layer(INPUTS)
        return layer.pack()

    @pytest.mark.skipif(keras.__version__ < "3.15", reason="torch cannot trace the operations of earlier Keras as one graph")
    def test_compiled_as_a_whole(self):
        import torch

        packed, x = self.packed(), torch.tensor(INPUTS)
        compiled = torch.compile(lambda x: packed_linear(x, packed.packed_kernel.value, packed.kernel_scale.value, None, None, 33) + 1,
                                 fullgraph=True, backend="aot_eager")  # fmt: skip
        expected = packed_linear(x, packed.packed_kernel, packed.kernel_scale, None, None, 33) + 1
        np.testing.assert_array_equal(compiled(x).numpy(), expected.numpy())

    def test_inference_mode_strides_and_dtypes(self):
        import torch

        packed, x = self.packed(), torch.tensor(INPUTS)
        expected = array(packed(x))
        with torch.inference_mode():
            np.testing.assert_array_equal(packed(x).numpy(), expected)
        strided = torch.empty(6, 8, 7)[:, ::2].permute(2, 1, 0).copy_(x)
        assert not strided.is_contiguous()
        np.testing.assert_array_equal(packed(strided).numpy(), expected)
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            rounded = x.to(dtype)
            y = packed_linear(rounded, packed.packed_kernel, packed.kernel_scale, packed.bias, None, 33)
            assert y.dtype == torch.float32
            np.testing.assert_array_equal(y.numpy(), array(packed(rounded.float())))

    def test_the_operator_is_registered_correctly(self):
        import torch

        packed = self.packed()
        arguments = (torch.tensor(INPUTS), packed.packed_kernel.value, packed.kernel_scale.value, None, None, 33, True, 8)
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(torch.ops.keras_mml.packed_linear.default, arguments, test_utils=checks)

    def test_a_gradient_is_refused(self):
        import torch

        x = torch.tensor(INPUTS, requires_grad=True)
        y = self.packed()(x)
        with pytest.raises(RuntimeError, match="packed layer has no gradient"):
            y.sum().backward()


@pytest.mark.skipif(BACKEND != "jax", reason="XLA's foreign function interface")
class TestJax:
    def test_the_handler_works_here(self):
        from keras_mml.native import operators

        assert operators.library() is not None

    def test_the_first_call_may_be_inside_jit(self):
        code = (
            "import jax, numpy as np, keras_mml\nfrom keras_mml.layers import DenseMML\n"
            "layer = DenseMML(3)\nlayer(np.ones((2, 4)))\npacked = layer.pack()\n"
            "y = jax.jit(lambda x: packed(x))(np.ones((2, 4), 'float32'))\n"
            "assert np.array_equal(y, packed(np.ones((2, 4), 'float32')))"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "KERAS_BACKEND": "jax"})

    @pytest.mark.parametrize("handler", [True, False])
    def test_inside_jit_and_vmap(self, handler, monkeypatch):
        import jax

        from keras_mml.native import operators

        if not handler:
            monkeypatch.setattr(operators, "library", lambda: None)
            operators._jax_compiled.cache_clear()
        layer = DenseMML(33, norm_gain=True)
        layer(INPUTS)
        packed = layer.pack()
        expected = array(packed(INPUTS))
        call = lambda x: packed(x)
        np.testing.assert_array_equal(np.asarray(jax.jit(call)(INPUTS)), expected)
        np.testing.assert_array_equal(np.asarray(jax.jit(jax.vmap(call))(INPUTS)), expected)
        np.testing.assert_array_equal(np.asarray(jax.lax.scan(lambda c, x: (c, packed(x)), 0, INPUTS)[1]), expected)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="graphs of tensorflow")
def test_in_a_tensorflow_graph():
    import tensorflow as tf

    layer = DenseMML(33, norm_gain=True)
    layer(INPUTS)
    packed = layer.pack()
    expected = array(packed(INPUTS))
    for signature in (None, [tf.TensorSpec((None, 4, 6))]):
        y = tf.function(lambda x: packed(x), input_signature=signature)(tf.constant(INPUTS))
        assert y.shape == (7, 4, 33)
        np.testing.assert_array_equal(y.numpy(), expected)


# The bytes of a state and the sizes that they are for

SMALL = st.integers(1, 6)
TYPES = [int, np.int8, np.int32, np.int64, np.uint16]


@st.composite
def states(draw):
    "A state, its sizes, and the same sizes in another order and of other integers."
    shape = tuple(draw(st.lists(SMALL, min_size=2, max_size=4)))
    bias, gain = (draw(st.sampled_from([0, size])) for size in (shape[-1], shape[0]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    vectors = {"kernel_scale": shape[-1], "bias": bias, "gain": gain}
    state = {n: rng.normal(size=s).astype("float32") for n, s in vectors.items() if s}
    state["trits"] = rng.integers(-1, 2, shape).astype("int8")
    sizes = layer_sizes(shape, bias, gain, draw(st.sampled_from(["rms", None])), draw(st.integers(2, 8)))
    kind = draw(st.sampled_from(TYPES))
    other = {**sizes, "kernel": [kind(n) for n in shape], "bias": kind(bias), "gain": kind(gain)}
    return state, sizes, dict(draw(st.permutations(list(other.items()))))


@given(states())
def test_a_state_is_read_as_it_was_written_whatever_the_order_and_type_of_its_sizes(drawn):
    state, sizes, same = drawn
    for written, read in [(sizes, same), (same, sizes)]:
        found = decode_state(encode_state(state, written), read)
        assert found.keys() == state.keys()
        for name, value in state.items():
            np.testing.assert_array_equal(found[name], value)
    np.testing.assert_array_equal(encode_state(state, sizes), encode_state(state, same))


def test_other_sizes_are_refused():
    state = {"trits": np.ones((2, 6), "int8"), "kernel_scale": np.ones(6, "float32")}
    sizes = layer_sizes((2, 6), 0, 0, "rms", 8)
    written = encode_state(state, sizes)
    for change in [{"kernel": (3, 4)}, {"kernel": (6, 2)}, {"norm": None}, {"activation_bits": 4}, {"bias": 6}]:
        with pytest.raises(ValueError, match="damaged, or was written by another layer"):
            decode_state(written, {**sizes, **change})
    for damaged in [written[:-1], written.astype("int16"), written[None], np.uint8(3), written[:0]]:
        with pytest.raises(ValueError, match="damaged, or was written by another layer"):
            decode_state(np.asarray(damaged), sizes)


def test_files_from_before_the_canonical_text_are_read():
    content = bytes.fromhex("cb940000003f0000803f0000803f0000803f")  # the trits of `eye(3)`, a scale of 0.5, and a bias of ones
    sizes = layer_sizes((3, 3), 3, 0, "rms", 8)
    before = "{'kernel': (3, 3), 'bias': 3, 'gain': 0, 'norm': 'rms', 'activation_bits': 8}"
    checksum = zlib.crc32(content, zlib.crc32(before.encode())).to_bytes(4, "little")
    state = decode_state(np.frombuffer(content + checksum, "uint8"), sizes)
    np.testing.assert_array_equal(state["trits"], np.eye(3))
    np.testing.assert_array_equal(state["kernel_scale"], np.full(3, 0.5))
    np.testing.assert_array_equal(state["bias"], np.ones(3))


def test_layers_whose_arguments_are_numpy_integers_load_in_keras_and_in_the_runtime(tmp_path):
    n = np.int64
    layers = [
        keras.Input((n(8), n(8), n(2))), Conv2DMML(n(6), (n(3), n(3)), padding="same"), keras.layers.Flatten(),
        DenseMML(5, activation_bits=4, norm_gain=True),
    ]  # fmt: skip
    model = pack(keras.Sequential(layers))
    model.save(tmp_path / "model.keras")
    x = np.random.normal(size=(3, 8, 8, 2)).astype("float32")
    expected = model.predict(x, verbose=0)
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras").predict(x, verbose=0), expected)
    np.testing.assert_allclose(runtime.load(tmp_path / "model.keras")(x), expected, rtol=1e-4, atol=1e-4)


def base_model():
    before = [keras.Input((4, 6)), keras.layers.Dense(8)]
    return keras.Sequential([*before, DenseMML(16), keras.layers.Dropout(0.2), Conv1DMML(5, 3, norm_gain=True)])


@pytest.mark.parametrize("how", [{}, dict(training=False)])
def test_a_packed_model_is_a_frozen_part(how):
    base = pack(base_model())
    base.trainable = False
    before = base.get_weights()
    inputs = keras.Input((4, 6))
    head = keras.layers.Dense(2)
    model = keras.Model(inputs, head(base(inputs, **how)))
    alone = keras.Sequential([keras.Input((2, 5)), keras.layers.Dense(2)])
    alone.set_weights(head.get_weights())
    y = np.random.normal(size=(7, 2, 2)).astype("float32")
    for trained in (model, alone):
        trained.compile(keras.optimizers.SGD(0.1), "mse")
    for layer in base.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0  # so that both see the same
    model.fit(INPUTS, y, batch_size=7, epochs=3, verbose=0)
    alone.fit(array(base(INPUTS)), y, batch_size=7, epochs=3, verbose=0)
    for ours, theirs in zip(head.get_weights(), alone.get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(np.array_equal(a, b) for a, b in zip(before, base.get_weights()))


def test_dropout_of_a_packed_model_can_stay_on():
    packed = pack(base_model())
    first, second, expected = (array(packed(INPUTS, training=training)) for training in (True, True, False))
    assert np.abs(first - second).max() > 0.01 and np.array_equal(array(packed(INPUTS)), expected)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    "layer", [lambda: DenseMML(5), lambda: Conv1DMML(5, 3, padding="same"), lambda: keras.layers.Bidirectional(GRUMML(5))]
)
def test_a_gradient_that_is_needed_through_a_packed_layer_is_an_error(layer, eager):
    def fit(trainable):
        inputs = keras.Input((4, 6))
        before = keras.layers.Dense(6)
        packed = pack(keras.Sequential([keras.Input((4, 6)), layer()]))
        model = keras.Model(inputs, keras.layers.Dense(2)(packed(before(inputs))))
        before.trainable = trainable
        model.compile("sgd", "mse", run_eagerly=eager)
        model.fit(INPUTS, np.zeros((7, *model.output_shape[1:]), "float32"), verbose=0)

    with pytest.raises(Exception, match="is packed and cannot be trained: a packed layer has no gradient"):
        fit(trainable=True)
    if not eager or BACKEND != "tensorflow":  # where the tape computes the gradients of frozen variables, too
        fit(trainable=False)


def test_a_packed_layer_is_never_trainable():
    packed = pack(base_model())
    packed.trainable = True
    assert [w.path.split("/")[-2] for w in packed.trainable_weights] == [packed.layers[0].name] * 2
    assert not packed.layers[1].trainable and packed.layers[0].trainable


@pytest.mark.skipif(BACKEND != "jax", reason="transformations of jax")
def test_gradients_of_jax_beside_a_packed_layer():
    import jax

    packed = pack(sequential())
    loss = lambda w, x: (w * packed(x)).sum()
    w = np.ones(3, "float32")
    for transform in (lambda f: f, jax.jit, jax.checkpoint):
        np.testing.assert_allclose(jax.grad(transform(loss))(w, INPUTS), array(packed(INPUTS)).sum(0), rtol=1e-5)
        with pytest.raises(RuntimeError, match="Layer 'dense_mml.*' is packed and cannot be trained"):
            jax.grad(transform(loss), argnums=1)(w, INPUTS)
    unused = lambda w, x: (w.sum(), packed(x))  # as a metric
    jax.jit(jax.grad(unused, argnums=0, has_aux=True))(w, INPUTS)
    jax.grad(unused, argnums=1, has_aux=True)(w, INPUTS)


@pytest.mark.parametrize("eager", [False, True])
def test_a_packed_part_of_a_model_that_fit_builds(eager):
    "In the first step the layers behind the packed ones have no weights yet."

    class Headed(keras.Model):
        def __init__(self):
            super().__init__()
            self.base, self.head = pack(sequential()), keras.layers.Dense(1)

        def call(self, x, training=None):
            return self.head(self.base(x, training=training))

    model = Headed()
    model.compile("sgd", "mse", run_eagerly=eager)
    losses = model.fit(INPUTS, np.ones((len(INPUTS), 1)), epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("eager", [False, True])
def test_a_layer_that_is_never_called_does_not_hide_that_nothing_is_trained(eager):
    class Spare(keras.Model):
        def __init__(self):
            super().__init__()
            self.base, self.spare = pack(sequential()), keras.layers.Dense(1)

        def call(self, x, training=None):
            return self.base(x, training=training)

    model = Spare()
    model.compile("sgd", "mse", run_eagerly=eager)
    with pytest.raises(ValueError, match="is packed and cannot be trained"):
        model.fit(INPUTS, np.ones((len(INPUTS), 3)), verbose=0)


def test_packed_weights_loaded_after_a_prediction(tmp_path):
    model = sequential()
    model.predict(INPUTS, verbose=0)  # on tensorflow, a compiled function knows the latent weights now
    packed = pack(model)
    packed.save_weights(tmp_path / "packed.weights.h5")
    model.load_weights(tmp_path / "packed.weights.h5")
    np.testing.assert_allclose(model.predict(INPUTS, verbose=0), packed.predict(INPUTS, verbose=0), atol=1e-6)


@pytest.mark.skipif(BACKEND != "torch", reason="compiled graphs of torch")
def test_a_gradient_is_refused_in_a_compiled_graph_of_torch():
    import torch

    packed = pack(sequential())
    compiled = torch.compile(lambda x: packed(x), backend="aot_eager")
    x = torch.tensor(INPUTS, requires_grad=True)
    with pytest.raises(Exception, match="packed layer has no gradient"):
        compiled(x).sum().backward()


@keras.saving.register_keras_serializable(package="tests")
class PartlyUsed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.used = DenseMML(3)
        self.spare, self.spare_recurrence = DenseMML(4), GRUMML(4)

    def call(self, x):
        return self.used(x)


def test_layers_that_were_never_called_stay_as_they_are(tmp_path):
    model = PartlyUsed()
    with pytest.raises(ValueError, match="Only built layers can be packed"):
        pack(model)
    expected = array(model(INPUTS))
    packed = pack(model)
    assert (packed.used.packed, packed.spare.packed, packed.spare.built) == (True, False, False)
    assert_same_within_rounding(packed(INPUTS), expected, step=0.05)
    with pytest.raises(ValueError, match="is packed already"):
        pack(packed)
    packed.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(array(keras.saving.load_model(tmp_path / "m.keras")(INPUTS)), array(packed(INPUTS)))
    assert pack(model, in_place=True).used.packed and not model.spare.packed


COMPOSED = {
    "GRUMML": lambda: GRUMML(8, return_sequences=True),
    "MultiHeadAttentionMML": lambda: AttendToItself(MultiHeadAttentionMML(2, 4, fully_mml=False)),
    "TransformerBlockMML": lambda: TransformerBlockMML(6, 12, 2, fully_mml=False),
    "PatchEmbedding": lambda: PatchEmbedding(4, 6, use_mml=False, with_positions=True),
    "TokenEmbedding": lambda: TokenEmbedding(6, 20, 6, with_positions=True),
}


@keras.saving.register_keras_serializable(package="tests")
class AttendToItself(keras.layers.Wrapper):
    def build(self, input_shape):
        if not self.layer.built:
            self.layer.build(input_shape, input_shape)

    def call(self, x):
        return self.layer(x, x)


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("name", COMPOSED)
def test_float_parts_of_composed_layers_stay_float_where_keras_quantises(name, tmp_path):
    x = np.arange(12).reshape(2, 6) if name == "TokenEmbedding" else INPUTS
    model = keras.Sequential([keras.Input(x.shape[1:]), COMPOSED[name](), DenseMML(6), keras.layers.Dense(2)])
    with pytest.warns(UserWarning, match="is part of a layer whose configuration cannot say that it is quantised"):
        model.quantize("int8")
    assert [layer for layer in model._flatten_layers() if getattr(layer, "quantization_mode", None)] == [model.layers[-1]]
    for each in (model, pack(model)):
        each.save(tmp_path / "m.keras")
        np.testing.assert_array_equal(array(keras.saving.load_model(tmp_path / "m.keras")(x)), array(each(x)))


def exported_model():
    bias = dict(bias_initializer="random_normal")  # without, the next layer would often see halves, which round either way
    layers = [DenseMML(70, **bias), Conv1DMML(6, 3, padding="same", **bias), keras.layers.Flatten(), DenseMML(3, scale="channel")]
    return pack(keras.Sequential([keras.Input((4, 6)), *layers]))


def run_elsewhere(code, folder):
    "The array that another process, which knows nothing of this package, writes."
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "KERAS_BACKEND")}
    code = f"import numpy as np\nx = np.load('x.npy')\n{code}\nimport sys\nassert 'keras_mml' not in sys.modules\nnp.save('y.npy', y)"
    np.save(folder / "x.npy", INPUTS)
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return np.load(folder / "y.npy")


@pytest.mark.with_tensorflow
@pytest.mark.skipif(BACKEND == "torch", reason="Keras writes no SavedModel from torch")
def test_an_exported_model_predicts_the_same_in_another_process(tmp_path):
    packed = exported_model()
    packed.predict(INPUTS, verbose=0)  # which makes a graph that calls the kernels
    packed.export(tmp_path / "model", verbose=False)
    y = run_elsewhere("import tensorflow as tf\nm = tf.saved_model.load('model')\ny = m.serve(tf.constant(x)).numpy()", tmp_path)
    np.testing.assert_allclose(y, array(packed(INPUTS)), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="graphs of tensorflow")
class TestTensorflow:
    def test_tflite(self, tmp_path):
        import tensorflow as tf

        packed = exported_model()
        packed.export(tmp_path / "m.tflite", format="litert", verbose=False)
        lite = tf.lite.Interpreter(str(tmp_path / "m.tflite"))
        (inputs,), (outputs,) = lite.get_input_details(), lite.get_output_details()
        lite.resize_tensor_input(inputs["index"], INPUTS.shape)
        lite.allocate_tensors()
        lite.set_tensor(inputs["index"], INPUTS)
        lite.invoke()
        np.testing.assert_allclose(lite.get_tensor(outputs["index"]), array(packed(INPUTS)), rtol=1e-4, atol=1e-4)

    def test_compiled_by_xla(self):
        import tensorflow as tf

        packed = exported_model()
        y = tf.function(lambda x: packed(x), jit_compile=True)(INPUTS)
        np.testing.assert_allclose(array(y), array(packed(INPUTS)), rtol=1e-4, atol=1e-4)

    def test_a_graph_that_calls_python_is_not_saved(self, tmp_path):
        import tensorflow as tf

        packed = exported_model()
        function = tf.function(lambda x: packed(x), input_signature=[tf.TensorSpec((None, 4, 6))])
        function(INPUTS)
        archive = keras.export.ExportArchive()
        archive.track(packed)
        archive.add_endpoint("serve", function)
        with pytest.raises(ValueError, match="keras_mml.export_onnx"):
            archive.write_out(tmp_path / "archive", verbose=False)
        tf.saved_model.save(packed, tmp_path / "model")  # traces it anew
        code = "import tensorflow as tf\nm = tf.saved_model.load('model')\n"
        code += "((_, y),) = m.signatures['serving_default'](tf.constant(x)).items()"
        y = run_elsewhere(code, tmp_path)
        np.testing.assert_allclose(y, array(packed(INPUTS)), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(BACKEND != "torch", reason="formats that torch writes")
class TestTorchExport:
    @pytest.mark.skipif(keras.__version__ < "3.15", reason="earlier Keras does not export to torch")
    def test_an_exported_program(self, tmp_path):
        import torch

        packed = exported_model()
        packed.export(tmp_path / "m.pt2", format="torch", verbose=False, dynamic_shapes={0: torch.export.Dim("batch", min=1, max=32)})
        y = run_elsewhere("import torch\ny = torch.export.load('m.pt2').module()(torch.tensor(x)).detach().numpy()", tmp_path)
        np.testing.assert_allclose(y, array(packed(INPUTS)), rtol=1e-4, atol=1e-4)

    def test_onnx_of_keras(self, tmp_path):
        pytest.importorskip("onnxscript")
        packed = exported_model()
        signature = [keras.InputSpec(shape=(7, 4, 6), dtype="float32")]
        packed.export(tmp_path / "m.onnx", format="onnx", verbose=False, input_signature=signature)
        code = "import onnxruntime\nm = onnxruntime.InferenceSession('m.onnx')\n(y,) = m.run(None, {m.get_inputs()[0].name: x})"
        y = run_elsewhere(code, tmp_path)
        np.testing.assert_allclose(y, array(packed(INPUTS)), rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="keras_mml.export_onnx"):
            packed.export(tmp_path / "m.onnx", format="onnx", verbose=False)


def packed_in_place(tmp_path):
    model = base_model()
    return model, lambda: pack(model, in_place=True)


def packed_with_an_optimizer(tmp_path):
    "One that has seen the kernels, and that Keras cannot make again."
    model = base_model()
    model.compile("sgd", not_registered)
    model.fit(INPUTS, np.zeros((7, 2, 5)), verbose=0)
    return model, lambda: pack(model, in_place=True)


def packed_by_a_file(tmp_path):
    "Nested, so that more than one model has listed the variables."
    model = keras.Sequential([keras.Input((4, 6)), base_model(), keras.layers.Dense(2)])
    pack(model).save_weights(tmp_path / "m.weights.h5")
    return model, lambda: model.load_weights(tmp_path / "m.weights.h5")


@pytest.mark.filterwarnings("ignore:.*is not compiled")
@pytest.mark.parametrize("way", [packed_in_place, packed_with_an_optimizer, packed_by_a_file])
def test_nothing_keeps_the_float_kernels(way, tmp_path):
    model, become_packed = way(tmp_path)
    model(INPUTS)
    kernels = [weakref.ref(owner) for v in model.weights if v.name == "kernel" and len(v.shape) == 3 for owner in (v, v.value)]
    dense = [layer for layer in model._flatten_layers() if isinstance(layer, DenseMML)]
    kernels += [weakref.ref(w) for layer in dense for w in (layer.kernel, layer.kernel.value)]
    become_packed()
    gc.collect()
    assert len(kernels) == 4 and not any(kernel() for kernel in kernels)


@pytest.mark.skipif(BACKEND != "torch", reason="modules of torch")
@pytest.mark.parametrize("way", [packed_in_place, packed_by_a_file])
def test_the_state_of_torch_is_the_packed_one(way, tmp_path):
    model, become_packed = way(tmp_path)
    become_packed()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = {name.split("/")[-1] for name in state if "dense_mml" in name}
    assert names == {"packed_kernel", "kernel_scale", "bias"}
    expected = array(model(INPUTS))
    for variable in model.variables:
        variable.assign(ops.zeros_like(variable.value))
    assert not np.array_equal(array(model(INPUTS)), expected)
    model.load_state_dict(state)
    np.testing.assert_array_equal(array(model(INPUTS)), expected)
    copied = pack(base_model()).state_dict()
    floats = [tensor for tensor in copied.values() if tensor.is_floating_point()]
    assert sum("packed_kernel" in name for name in copied) and not any(tensor.isnan().any() for tensor in floats)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="checkpoints of tensorflow")
def test_a_checkpoint_of_tensorflow_is_as_small(tmp_path):
    import tensorflow as tf

    def size(model):
        path = tf.train.Checkpoint(model=model).write(str(tmp_path / "checkpoint"))
        return sum(os.path.getsize(p) for p in tmp_path.iterdir() if p.name.startswith(os.path.basename(path)))

    model = keras.Sequential([keras.Input((256,)), DenseMML(256)])
    packed = pack(model)
    assert size(packed) < size(model) / 8
    x = np.random.normal(size=(3, 256)).astype("float32")
    expected = array(packed(x))
    path = tf.train.Checkpoint(model=packed).write(str(tmp_path / "again"))
    other = pack(keras.Sequential([keras.Input((256,)), DenseMML(256)]))
    tf.train.Checkpoint(model=other).read(path).assert_consumed()
    np.testing.assert_array_equal(array(other(x)), expected)
