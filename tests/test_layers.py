"""`DenseMML` and `RMSNorm` compute what their documentation says. What holds for every layer is in test_family.py."""

import inspect
import json
import warnings

import keras
import numpy as np
import pytest
from keras import ops

from keras_mml.layers import DenseMML, RMSNorm
from keras_mml.quantizers import AbsmaxInt, AbsmeanTernary, StraightThroughQuantizer
from keras_mml.testing import gradients


@pytest.mark.any_backend
def test_every_documented_argument_of_dense_has_the_same_default():
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (DenseMML, keras.layers.Dense))
    keras_only = {"self", "kwargs", "lora_rank", "lora_alpha", "quantization_config"}
    for name in theirs.keys() - keras_only:
        assert ours[name].default == theirs[name].default, name


@pytest.mark.any_backend
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
        (dict(units=3, scale="row"), "`scale`, expected \"tensor\", \"channel\" or"),
        (dict(units=3, scale="row"), "Received: scale='row'"),
        (dict(units=3, scale=None), "scale=None"),
        (dict(units=3, scale="absmax"), "scale='absmax'"),
        (dict(units=3, scale=np.ones(3)), "`scale`"),
        (dict(units=3, scale=keras.quantizers.AbsMaxQuantizer(axis=-1)), "StraightThroughQuantizer"),
        (dict(units=3, activation_bits=1), "`activation_bits`, expected an integer from 2 to 8"),
        (dict(units=3, activation_bits=8.0), "activation_bits=8.0"),
        (dict(units=3, activation_bits=True), "activation_bits=True"),
        (dict(units=3, activation_bits=None), "activation_bits=None"),
        (dict(units=3, activation_bits="absmean"), "activation_bits='absmean'"),
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


def numpy_reference(x, kernel, bias, scale="tensor", bits=8, norm=True, gain=1.0):
    "The four steps of the layer with an exact integer product."
    x = np.asarray(x, "float64")
    if norm:
        x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * gain
    limit = 2 ** (bits - 1) - 1
    s = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5) / limit
    gamma = np.maximum(np.abs(kernel).mean(axis=0 if scale == "channel" else None), 1e-5)
    q, T = np.round(x / s).astype("int64"), np.clip(np.round(kernel / gamma), -1, 1).astype("int64")
    return (q @ T) * s * gamma + bias, s * gamma


@pytest.mark.parametrize("scale", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("norm", ["rms", "rms with gain", None])
def test_output_is_the_integer_product(scale, bits, norm):
    rng = np.random.default_rng(1)
    arguments = dict(norm="rms" if norm else None, norm_gain=norm == "rms with gain")
    layer = DenseMML(33, scale=scale, activation_bits=bits, bias_initializer="random_normal", **arguments)
    x, gain = rng.normal(size=(7, 51)).astype("float32"), 1.0
    layer.build(x.shape)
    if layer.norm_gain:
        gain = rng.uniform(0.5, 2, 51)
        layer.gain.assign(gain)
    y = ops.convert_to_numpy(layer(x))
    kernel, bias = (ops.convert_to_numpy(w) for w in (layer.kernel, layer.bias))
    expected, step = numpy_reference(x, kernel, bias, scale, bits, bool(norm), gain)
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


@pytest.mark.parametrize("norm", ["rms", None])
def test_empty_batches_give_empty_outputs(norm):
    layer = DenseMML(3, norm=norm)
    assert tuple(layer(np.ones((0, 4), "float32")).shape) == (0, 3)
    assert tuple(layer(np.ones((2, 0, 4), "float32")).shape) == (2, 0, 3)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Keras has sparse tensors on tensorflow")
def test_sparse_inputs_are_accepted():
    import tensorflow as tf

    dense = np.eye(4, 6, dtype="float32")
    inputs = keras.Input((6,), sparse=True)
    layer = DenseMML(3)
    model = keras.Model(inputs, layer(inputs))
    np.testing.assert_array_equal(ops.convert_to_numpy(model(tf.sparse.from_dense(dense))), ops.convert_to_numpy(layer(dense)))


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


class Recording(AbsmeanTernary):
    "Remembers the trits it gave."

    def quantize(self, x):
        self.trits, scale = super().quantize(x)
        return self.trits, scale


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_rounds_the_full_precision_weights(dtype):
    # Weights so close to the threshold that a kernel cast to half precision first would give other trits.
    kernel = np.ones((64, 8), "float32")
    kernel[::2] = np.linspace(0.33332, 0.33334, 8, dtype="float32")  # half of the mean is 1/3
    layer = DenseMML(8, dtype=dtype, scale=Recording())
    layer.build((None, 64))
    layer.kernel.assign(kernel)
    layer(np.ones((2, 64), "float32"))
    expected = np.clip(np.round(kernel / np.abs(kernel).mean()), -1, 1)
    assert 0 < expected[0].sum() < 8
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.kernel_quantizer.trits), expected)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"])
def test_half_precision_stays_close_to_full_precision(dtype):
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


def test_the_gain_of_the_normalisation_learns():
    rng = np.random.default_rng(0)
    layer = DenseMML(8, norm_gain=True, use_bias=False)
    x, upstream = rng.normal(size=(5, 12)).astype("float32"), rng.normal(size=(5, 8)).astype("float32")
    layer(x)
    kernel, gain = ops.convert_to_numpy(layer.kernel), rng.uniform(0.5, 2, 12).astype("float32")

    def weighted(gain):
        return ops.multiply(layer.stateless_call([kernel, gain], [], x)[0], upstream)

    T, gamma = (ops.convert_to_numpy(t) for t in AbsmeanTernary().quantize(kernel))
    normalized = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(gradients(weighted, gain)[0], (upstream @ (gamma * T).T * normalized).sum(0), rtol=1e-3, atol=1e-4)


def test_rms_norm_multiplies_and_adds():
    rng = np.random.default_rng(0)
    layer = RMSNorm(use_bias=True)
    x, gain, bias = rng.normal(size=(3, 6)), rng.normal(size=6), rng.normal(size=6)
    layer.build(x.shape)
    layer.gain.assign(gain), layer.bias.assign(bias)
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * gain + bias
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), expected, rtol=1e-5, atol=1e-5)


WEIGHTS = [(DenseMML, dict(units=3), "kernel"), (DenseMML, dict(units=3), "bias")]
WEIGHTS += [(RMSNorm, {}, "gain"), (RMSNorm, dict(use_bias=True), "bias")]


@pytest.mark.parametrize("cls, arguments, weight", WEIGHTS)
def test_regularizers_and_constraints_see_their_weight(cls, arguments, weight):
    kwargs = {f"{weight}_initializer": "ones", f"{weight}_regularizer": keras.regularizers.L1(0.5)}
    layer = cls(**arguments, **kwargs)
    layer(np.ones((2, 4), "float32"))
    (loss,) = layer.losses
    assert float(loss) == pytest.approx(0.5 * int(np.prod(getattr(layer, weight).shape)))

    layer = cls(**arguments, **{f"{weight}_constraint": keras.constraints.MaxNorm(0.01, axis=0)})
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(optimizer=keras.optimizers.SGD(1.0), loss="mse")
    model.train_on_batch(np.ones((2, 4), "float32"), np.ones((2, model.output_shape[-1]), "float32"))
    assert np.linalg.norm(ops.convert_to_numpy(getattr(layer, weight)), axis=0).max() <= 0.0101


def test_activity_regularizer_sees_the_outputs():
    arguments = dict(kernel_initializer="zeros", bias_initializer="ones", activity_regularizer=keras.regularizers.L1(1.0))
    layer, twin = DenseMML(3, **arguments), keras.layers.Dense(3, **arguments)
    layer(np.ones((2, 4), "float32")), twin(np.ones((2, 4), "float32"))
    assert float(layer.losses[0]) == pytest.approx(float(twin.losses[0]))
    assert float(twin.losses[0]) == 3


@pytest.mark.any_backend
def test_every_argument_survives_a_round_trip():
    arguments = dict(
        units=3, activation="relu", use_bias=True, kernel_initializer="he_normal", bias_initializer="ones", kernel_regularizer="l1",
        bias_regularizer="l2", activity_regularizer="l1", kernel_constraint="non_neg", bias_constraint="max_norm", norm="rms",
        norm_gain=True, scale=AbsmeanTernary("channel"), activation_bits=AbsmaxInt(5),
    )  # fmt: skip
    layer = DenseMML(**arguments)
    again = DenseMML.from_config(json.loads(json.dumps(layer.get_config())))
    for name in arguments:
        assert type(getattr(again, name)) is type(getattr(layer, name)), name
    assert again.activation_quantizer.bits == 5 and again.kernel_quantizer.scale == "channel"


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


@pytest.mark.slow_to_compile
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

    def get_config(self):
        return {}


def test_own_quantizers_work_and_are_saved(tmp_path):
    model = keras.Sequential([keras.Input((6,)), DenseMML(4, scale=SignQuantizer())])
    model.save(tmp_path / "own.keras")
    loaded = keras.saving.load_model(tmp_path / "own.keras")
    assert isinstance(loaded.layers[0].kernel_quantizer, SignQuantizer)
    x = np.random.default_rng(0).normal(size=(2, 6)).astype("float32")
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded(x)), ops.convert_to_numpy(model(x)))


@pytest.mark.any_backend
def test_a_quantizer_without_configuration_is_not_saved_silently():
    class Forgetful(StraightThroughQuantizer):
        def quantize(self, x):
            return ops.sign(x), 1.0

    with pytest.raises(NotImplementedError, match="get_config"):
        DenseMML(3, scale=Forgetful()).get_config()


def test_keras_post_training_quantization_leaves_the_layer_alone():
    model = keras.Sequential([keras.Input((6,)), DenseMML(4), keras.layers.Dense(2)])
    x = np.random.default_rng(0).normal(size=(2, 6)).astype("float32")
    before = ops.convert_to_numpy(model.layers[0](x))
    with pytest.warns(UserWarning, match="does not have a `quantize` method"):
        model.quantize("int8")
    assert model.layers[1].dtype_policy.name == "int8_from_float32"
    assert model.layers[0].dtype_policy.name == "float32"
    np.testing.assert_array_equal(ops.convert_to_numpy(model.layers[0](x)), before)


def test_one_feature_whose_size_is_divided_away_is_warned_of():
    for norm, inputs in [("rms", 1), (None, 1), ("rms", 2)]:
        layer = DenseMML(1, norm=norm, kernel_initializer="ones")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            layer.build((None, inputs))
        messages = [str(w.message) for w in warned]
        assert bool(messages) == (norm == "rms" and inputs == 1)
        assert all("leaves only its sign. Use `norm=None`" in m for m in messages)
    x = np.array([[0.5], [-3.0]], "float32")
    np.testing.assert_allclose(ops.convert_to_numpy(DenseMML(1, norm="rms", kernel_initializer="ones")(x)), np.sign(x), rtol=1e-4)
    np.testing.assert_allclose(ops.convert_to_numpy(DenseMML(1, norm=None, kernel_initializer="ones")(x)), x, rtol=1e-6)


def test_rms_norm_of_a_vector_and_its_scale():
    x = np.array([3.0, -4.0], "float32")
    layer = RMSNorm(gain_initializer=keras.initializers.Constant(2), bias_initializer="ones", use_bias=True)
    assert layer.scale is None
    y = ops.convert_to_numpy(layer(x))
    np.testing.assert_allclose(y, 2 * x / np.sqrt(12.5) + 1, rtol=1e-5)
    assert layer.scale == pytest.approx(2**0.5)
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x[None]))[0], y, rtol=1e-6)
    with pytest.raises(ValueError, match="min_ndim=1"):
        layer(np.float32(3))
