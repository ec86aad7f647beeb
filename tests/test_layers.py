"""Every layer keeps Keras' conventions, checked by Keras' own conformance test, and behaves as its documentation says."""

import inspect
import json

import keras
import numpy as np
import pytest
from keras import ops
from keras.src import testing

from keras_mml.layers import DenseMML, RMSNorm
from keras_mml.quantizers import AbsmaxInt, AbsmeanTernary, StraightThroughQuantizer
from keras_mml.testing import gradients


class ConformanceTest(testing.TestCase):
    def test_dense(self):
        for arguments, weights in [
            (dict(units=5), 2),
            (dict(units=5, activation="relu", use_bias=False), 1),
            (dict(units=5, norm=None, scale="channel", activation_bits=4), 2),
            (dict(units=5, norm_gain=True, kernel_regularizer="l2", bias_constraint="non_neg"), 3),
            (dict(units=5, scale=AbsmeanTernary("channel"), activation_bits=AbsmaxInt(6)), 2),
        ]:
            for input_shape in [(4, 7), (2, 3, 7), (2, 3, 4, 7)]:
                self.run_layer_test(
                    DenseMML,
                    init_kwargs=arguments,
                    input_shape=input_shape,
                    expected_output_shape=(*input_shape[:-1], 5),
                    expected_num_trainable_weights=weights,
                    expected_num_non_trainable_weights=0,
                    expected_num_losses=1 if "kernel_regularizer" in arguments else 0,
                    supports_masking=True,
                    run_training_check=True,
                    run_mixed_precision_check=True,
                )

    def test_rms_norm(self):
        for arguments, weights in [
            ({}, 1),
            (dict(has_learnable_weights=False), 0),
            (dict(use_bias=True, gain_regularizer="l2", bias_initializer="ones"), 2),
        ]:
            for input_shape in [(4, 7), (2, 3, 7)]:
                self.run_layer_test(
                    RMSNorm,
                    init_kwargs=arguments,
                    input_shape=input_shape,
                    expected_output_shape=input_shape,
                    expected_num_trainable_weights=weights,
                    expected_num_losses=1 if "gain_regularizer" in arguments else 0,
                    supports_masking=True,
                    run_training_check=weights > 0,
                    run_mixed_precision_check=True,
                )


def test_every_documented_argument_of_dense_has_the_same_default():
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (DenseMML, keras.layers.Dense))
    keras_only = {"self", "kwargs", "lora_rank", "lora_alpha", "quantization_config"}
    for name in theirs.keys() - keras_only:
        assert ours[name].default == theirs[name].default, name


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(units=0), "Received an invalid value for `units`, expected a positive integer. Received: units=0"),
        (dict(units=-1), "units=-1"),
        (dict(units=2.5), "units=2.5"),
        (dict(units="8"), "units='8'"),
        (dict(units=True), "units=True"),
        (dict(units=3, activation="reluu"), "reluu"),
        (dict(units=3, norm="layer"), "norm='layer'"),
        (dict(units=3, norm=None, norm_gain=True), "norm_gain"),
        (dict(units=3, scale="row"), "Received: 'row'"),
        (dict(units=3, scale=None), "Received: None"),
        (dict(units=3, activation_bits=1), "bits=1"),
        (dict(units=3, activation_bits=8.0), "bits=8.0"),
        (dict(units=3, activation_bits="absmux"), "absmax"),
        (dict(units=3, kernel_initializer="glorot"), "glorot"),
    ],
)
def test_invalid_arguments_say_what_was_received(arguments, message):
    with pytest.raises(ValueError) as error:
        DenseMML(**arguments)
    assert message in str(error.value)


def test_invalid_inputs_say_what_was_expected():
    with pytest.raises(ValueError, match="last dimension of the inputs to `DenseMML` must be defined"):
        DenseMML(3)(keras.Input((None,)))
    with pytest.raises(ValueError, match="min_ndim=2"):
        DenseMML(3)(np.ones(4, "float32"))
    layer = DenseMML(3)
    layer(np.ones((2, 4), "float32"))
    with pytest.raises(ValueError, match="axis -1 .*4"):
        layer(np.ones((2, 5), "float32"))


def test_quantized_dtype_policies_are_refused():
    with pytest.raises((ValueError, NotImplementedError)):
        DenseMML(3, dtype="int8_from_float32")(np.ones((2, 4), "float32"))


def numpy_reference(x, kernel, bias, scale="tensor", bits=8, norm=True):
    "The four steps of the layer with an exact integer product."
    x = np.asarray(x, "float64")
    if norm:
        x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    limit = 2 ** (bits - 1) - 1
    s = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5) / limit
    gamma = np.maximum(np.abs(kernel).mean(axis=0 if scale == "channel" else None), 1e-5)
    q, T = np.round(x / s).astype("int64"), np.clip(np.round(kernel / gamma), -1, 1).astype("int64")
    return (q @ T) * s * gamma + bias, s * gamma


@pytest.mark.parametrize("scale", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("norm", ["rms", None])
def test_output_is_the_integer_product(scale, bits, norm):
    rng = np.random.default_rng(1)
    layer = DenseMML(33, scale=scale, activation_bits=bits, norm=norm, bias_initializer="random_normal")
    x = rng.normal(size=(7, 51)).astype("float32")
    y = ops.convert_to_numpy(layer(x))
    kernel, bias = (ops.convert_to_numpy(w) for w in (layer.kernel, layer.bias))
    expected, step = numpy_reference(x, kernel, bias, scale, bits, norm == "rms")
    # float rounding, and where float32 and float64 round a tie differently, one step of one input
    close = np.abs(y - expected) <= 1e-4 + 1e-5 * np.abs(expected)
    assert close.mean() > 0.95 and np.all(np.abs(y - expected) <= step * 1.01 + 1e-4)


def test_integer_float64_and_float32_inputs_agree():
    layer = DenseMML(5)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9))
    outputs = [ops.convert_to_numpy(layer(pixels.astype(dtype))) for dtype in ("float32", "float64", "int32", "uint8")]
    for y in outputs:
        assert y.dtype == np.float32
        np.testing.assert_array_equal(y, outputs[0])


def test_zero_rows_and_rows_that_are_not_numbers():
    layer = DenseMML(4, activation="relu", bias_initializer="ones")
    x = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")
    x[1], x[2, 3], x[3, 0] = 0, np.nan, np.inf
    y = ops.convert_to_numpy(layer(x))
    np.testing.assert_array_equal(y[1], np.ones(4))  # activation(bias)
    assert np.isnan(y[2]).all() and np.isnan(y[3]).all()
    clean = x[[0, 4]]
    np.testing.assert_allclose(y[[0, 4]], ops.convert_to_numpy(layer(clean)), rtol=1e-6)


def test_zero_kernel_gives_the_bias():
    y = DenseMML(4, kernel_initializer="zeros", bias_initializer="ones")(np.ones((2, 6), "float32"))
    np.testing.assert_array_equal(ops.convert_to_numpy(y), np.ones((2, 4)))


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"])
def test_half_precision_uses_the_same_trits_and_integers(dtype):
    full, half = DenseMML(16), DenseMML(16, dtype=dtype)
    x = np.random.default_rng(0).normal(size=(4, 64)).astype("float32")
    full(x), half(x)
    full.kernel.assign(half.kernel)
    # the autocast inputs, so that both round the same numbers
    x = ops.cast(x, half.compute_dtype)
    y = half(x)
    assert keras.backend.standardize_dtype(y.dtype) == half.compute_dtype
    if dtype.startswith("mixed"):
        assert keras.backend.standardize_dtype(half.kernel.dtype) == "float32"
    expected = ops.convert_to_numpy(full(ops.cast(x, "float32")))
    np.testing.assert_allclose(ops.convert_to_numpy(ops.cast(y, "float32")), expected, rtol=0.05, atol=0.05)


def test_gradients_of_all_weights_match_the_formula():
    rng = np.random.default_rng(0)
    layer = DenseMML(8, norm=None, bias_initializer="random_normal")
    x, upstream = rng.normal(size=(5, 12)).astype("float32"), rng.normal(size=(5, 8)).astype("float32")
    layer(x)
    kernel, bias = (ops.convert_to_numpy(w) for w in (layer.kernel, layer.bias))

    def weighted(x, kernel, bias):
        return ops.multiply(layer.stateless_call([kernel, bias], [], x)[0], upstream)

    dx, dkernel, dbias = gradients(weighted, x, kernel, bias)
    (q, s), (T, gamma) = (
        [ops.convert_to_numpy(t) for t in quantizer.quantize(v)] for quantizer, v in ((AbsmaxInt(), x), (AbsmeanTernary(), kernel))
    )
    np.testing.assert_allclose(dx, upstream @ (gamma * T).T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dkernel, (q * s).T @ upstream, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dbias, upstream.sum(0), rtol=1e-4, atol=1e-5)


def test_masks_pass_through():
    model = keras.Sequential([keras.layers.Embedding(10, 6, mask_zero=True), RMSNorm(), DenseMML(4)])
    tokens = np.array([[1, 2, 0]])
    np.testing.assert_array_equal(ops.convert_to_numpy(model(tokens)._keras_mask), [[True, True, False]])


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.norm, self.out = DenseMML(8, activation="relu"), RMSNorm(), DenseMML(3)

    def call(self, x):
        return self.out(self.norm(self.hidden(x)))


def functional():
    inputs = keras.Input((4, 6))
    shared = DenseMML(6, activation="relu")
    x = shared(shared(inputs))
    x = keras.layers.TimeDistributed(DenseMML(5))(x)
    return keras.Model(inputs, keras.layers.Flatten()(x))


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("build", [Subclassed, functional])
def test_models_train_with_and_without_compilation(build, jit_compile):
    if jit_compile and keras.backend.backend() == "torch":
        pytest.skip("torch compiles with a C++ compiler and minutes of time; Keras' own default there is not to")
    keras.utils.set_random_seed(0)
    model = build()
    x = np.random.default_rng(0).normal(size=(32, 4, 6)).astype("float32")
    y = np.random.default_rng(1).normal(size=model(x).shape).astype("float32")
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse", jit_compile=jit_compile)
    losses = model.fit(x, y, epochs=15, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_clone_and_config_round_trip():
    model = functional()
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype("float32")
    np.testing.assert_array_equal(ops.convert_to_numpy(clone(x)), ops.convert_to_numpy(model(x)))
    layer = DenseMML(3, scale="channel", activation_bits=AbsmaxInt(5), kernel_regularizer="l1", activity_regularizer="l2")
    config = json.loads(json.dumps(layer.get_config()))
    assert DenseMML.from_config(config).get_config() == layer.get_config()


@keras.saving.register_keras_serializable(package="tests")
class SignQuantizer(StraightThroughQuantizer):
    def quantize(self, x):
        return ops.sign(x), ops.mean(ops.abs(x))


def test_own_quantizers_work_and_are_saved(tmp_path):
    model = keras.Sequential([keras.Input((6,)), DenseMML(4, scale=SignQuantizer())])
    model.save(tmp_path / "own.keras")
    loaded = keras.saving.load_model(tmp_path / "own.keras")
    assert isinstance(loaded.layers[0].kernel_quantizer, SignQuantizer)
    x = np.random.default_rng(0).normal(size=(2, 6)).astype("float32")
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded(x)), ops.convert_to_numpy(model(x)))


def test_keras_post_training_quantization_leaves_the_layer_alone():
    model = keras.Sequential([keras.Input((6,)), DenseMML(4), keras.layers.Dense(2)])
    x = np.random.default_rng(0).normal(size=(2, 6)).astype("float32")
    before = ops.convert_to_numpy(model.layers[0](x))
    model.quantize("int8", filters="^dense$|^dense_[0-9]+$")
    np.testing.assert_array_equal(ops.convert_to_numpy(model.layers[0](x)), before)
