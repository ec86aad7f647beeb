"""From float models to ternary ones and back: what is converted, with which weights, and what stays as it was."""

import functools

import keras
import numpy as np
import pytest
from cases import BACKEND, CASES, array, each, packable
from keras import layers, ops

from keras_mml import layers as matmul_free
from keras_mml import pack, summary
from keras_mml.conversion import conversion_plan, fit_scale, ternarize, to_dense
from keras_mml.layers.options import OPTIONS
from keras_mml.layers.packed import PackableLayer
from keras_mml.layers.twins import TWINS
from keras_mml.quantizers import AbsmeanTernary


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def mlp():
    hidden = [layers.Dense(16, activation="relu", name="first"), layers.Dense(8, name="second")]
    return keras.Sequential([keras.Input((12,)), *hidden, layers.Dense(3)])


def encoder(dim=16, length=6):
    inputs = keras.Input((length, dim))
    x = inputs
    for _ in range(2):
        h = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(2, 8)(h, h)
        h = layers.Dense(32, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.EinsumDense("btc,cd->btd", (None, dim), bias_axes="d")(h)
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling1D()(x)))


def convnet():
    inputs = keras.Input((12, 12, 3))
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu", use_bias=False)(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2)(x)
    block = keras.Sequential([keras.Input((4, 4, 16)), layers.Conv2D(8, 1, activation="relu", name="inner")], name="block")
    return keras.Model(inputs, layers.Dense(5)(layers.Flatten()(block(x))))


def shaken(model):
    for i, weight in enumerate(model.trainable_weights):
        weight.assign(weight + 0.05 * normal(*weight.shape, seed=i))
    return model


@pytest.mark.parametrize("scale", ["tensor", "channel"])
@pytest.mark.parametrize("shape", [(40, 7), (3, 3, 4, 7)])
def test_the_scale_is_that_of_least_squares(scale, shape):
    kernel, quantizer = normal(*shape) + 0.1, AbsmeanTernary(scale)
    before, _ = (array(v) for v in quantizer.quantize(kernel))
    trits, best = (array(v) for v in quantizer.quantize(fit_scale(kernel, quantizer)))
    np.testing.assert_array_equal(trits, before)
    columns, flat = kernel.reshape(-1, 7), trits.reshape(-1, 7)
    for c in range(7) if scale == "channel" else [slice(None)]:
        expected, *_ = np.linalg.lstsq(flat[:, c].reshape(-1, 1), columns[:, c].reshape(-1), rcond=None)
        np.testing.assert_allclose(best.ravel()[c if scale == "channel" else 0], expected[0], rtol=1e-4)
    assert (fit_scale(np.zeros((4, 3), "float32"), quantizer) == 0).all()


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("build, count", [(mlp, 2), (convnet, 3), (encoder, 6)])
def test_twins_compute_what_ternary_weights_would_in_the_float_model(build, count):
    model = shaken(build())
    x = normal(5, *model.input_shape[1:])
    ternary = ternarize(model, activation_bits=8, verbose=False)
    assert sum(isinstance(layer, (PackableLayer, matmul_free.MultiHeadAttentionMML)) for layer in ternary._flatten_layers()) >= count
    names = [[layer.name for layer in m.layers if type(layer) is not layers.InputLayer] for m in (ternary, model)]
    assert names[0] == names[1]
    assert type(ternary.layers[-1]) is layers.Dense
    np.testing.assert_array_equal(array(ternary.layers[-1].kernel), array(model.layers[-1].kernel))
    # The float model with kernels that are ternary already is kept, up to the rounding of inputs to 8 bits.
    for row in conversion_plan(model):
        if row.becomes:
            parts = [p for p in row.layer._flatten_layers() if getattr(p, "kernel", None) is not None]
            for part in parts:
                rows = array(part.kernel)
                flat = rows.reshape(-1, *rows.shape[-1:]) if row.becomes != "DepthwiseConv2DMML" else rows.reshape(*rows.shape[:2], -1)
                trits, scale = (array(v) for v in AbsmeanTernary().quantize(fit_scale(flat, AbsmeanTernary())))
                part.kernel.assign((trits * scale).reshape(rows.shape))
    again = ternarize(model, verbose=False)
    expected = array(model(x))
    for copy in (ternary, again):
        assert np.abs(array(copy(x)) - expected).max() < 0.06 * np.abs(expected).max()
    y = np.zeros((5, model.output_shape[-1]), "float32")
    again.compile(keras.optimizers.Adam(0.01), "mse")
    losses = [again.train_on_batch(x, y) for _ in range(10)]
    assert losses[-1] < losses[0]
    packed = pack(again)
    assert np.median(np.abs(array(packed(x)) - array(again(x)))) < 1e-3 * np.abs(expected).max()
    floats, latent, shipped = (summary(m).to_dict()["total"] for m in (model, again, packed))
    assert floats["ternary_parameters"] == 0 < latent["ternary_parameters"] == shipped["ternary_parameters"]
    assert floats["parameters"] == latent["parameters"] and shipped["bytes_packed"] == latent["bytes_packed"] < floats["bytes_packed"]


@each([case for case in CASES if issubclass(case.cls, PackableLayer) and case.arguments.get("padding") != "causal"])
def test_layers_of_one_kernel_go_there_and_back(case):
    "With the same arguments, the weights but for their rounding, and the same numbers where inputs are rounded."
    cls, theirs = case.cls, case.cls.keras_twins[0]
    arguments = {name: value for name, value in case.arguments.items() if name not in OPTIONS}
    model = shaken(keras.Sequential([case.input(), theirs(**arguments)]))
    ternary = ternarize(model, last=True, verbose=False)
    back = to_dense(ternary, quantize_inputs=True)
    ours, again = ternary.layers[-1], back.layers[-1].layers[-1]
    assert type(ours) is TWINS[theirs] is cls and type(again) is theirs
    assert again.get_config() == model.layers[-1].get_config()
    assert {name: ours.get_config()[name] for name in arguments} == {name: again.get_config()[name] for name in arguments}
    x = case.data()
    np.testing.assert_allclose(array(back(x)), array(ternary(x)), rtol=1e-4, atol=1e-4)
    kernel = array(model.layers[-1].kernel)
    assert np.corrcoef(array(again.kernel).ravel(), kernel.ravel())[0, 1] > 0.5


def test_the_model_stays_as_it_was_and_the_copy_is_compiled_like_it(tmp_path):
    model = mlp()
    model.compile(keras.optimizers.SGD(0.03), "mae", metrics=["mse"])
    before = [array(w) for w in model.weights]
    ternary = ternarize(model, calibration=normal(32, 12), verbose=False)
    for w, old in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(array(w), old)
    assert type(model.layers[0]) is layers.Dense and model.layers[0].activation is keras.activations.relu
    assert ternary.layers[0].activation is keras.activations.relu
    x, y = normal(8, 12), normal(8, 3)
    assert isinstance(ternary.optimizer, keras.optimizers.SGD)
    assert set(ternary.evaluate(x, y, return_dict=True, verbose=0)) == {"loss", "mse"}
    ternary.fit(x, y, verbose=0)
    ternary.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(array(keras.saving.load_model(tmp_path / "m.keras")(x)), array(ternary(x)))


def test_filters_the_last_layer_and_options():
    model = mlp()
    names = lambda m: [type(layer).__name__ for layer in m.layers]  # noqa: E731
    quiet = dict(verbose=False)
    assert names(ternarize(model, **quiet)) == ["DenseMML", "DenseMML", "Dense"]
    assert names(ternarize(model, last=True, **quiet)) == ["DenseMML"] * 3
    assert names(ternarize(model, filters="^sec", **quiet)) == ["Dense", "DenseMML", "Dense"]
    assert names(ternarize(model, filters=["first", "x"], **quiet)) == ["DenseMML", "Dense", "Dense"]
    assert names(ternarize(model, filters=lambda layer: layer.units == 8, **quiet)) == ["Dense", "DenseMML", "Dense"]
    first = ternarize(model, norm="rms", norm_gain=True, scale="channel", activation_bits=4, **quiet).layers[0]
    assert (first.norm, first.norm_gain, first.scale, first.activation_bits) == ("rms", True, "channel", 4)
    reasons = {row.path: row.reason for row in conversion_plan(model, filters="first")}
    assert reasons == {"first": None, "second": "not selected by `filters`", model.layers[2].name: "the last layer"}


def test_nested_shared_and_distributed_layers():
    shared = layers.Dense(8, name="shared")
    inner = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="inside")], name="inner")
    inputs = keras.Input((4, 12))
    x = layers.TimeDistributed(layers.Dense(8, name="each"), name="distributed")(inputs)
    x = shared(shared(x))
    x = layers.TimeDistributed(inner, name="deep")(x)
    model = keras.Model(inputs, layers.Activation("softmax")(layers.Dense(3, name="answer")(layers.Flatten()(x))))
    plan = {row.path: row.becomes for row in conversion_plan(model)}
    assert plan == {"distributed": "DenseMML", "shared": "DenseMML", "deep/inside": "DenseMML", "answer": None}
    ternary = ternarize(model, verbose=False)
    ternarized = [layer.name for layer in ternary._flatten_layers() if isinstance(layer, matmul_free.DenseMML)]
    assert sorted(ternarized) == ["each", "inside", "shared"]
    assert ternary.get_layer("deep").layer.layers[0] is not inner.layers[0]
    assert len(ternary.weights) == len(model.weights)
    x = normal(2, 4, 12)
    assert tuple(ternary(x).shape) == (2, 3)


@pytest.mark.slow_to_compile
def test_grouped_queries_and_recurrences():
    inputs = keras.Input((6, 16))
    x = layers.GroupQueryAttention(head_dim=4, num_query_heads=4, num_key_value_heads=2)(inputs, inputs)
    x = layers.GRU(8, return_sequences=True, name="gru")(x)
    x = layers.LSTM(8, name="lstm")(x)
    model = shaken(keras.Model(inputs, layers.Dense(2)(x)))
    plan = {type(row.layer).__name__: row for row in conversion_plan(model)}
    assert plan["GroupedQueryAttention"].becomes == "MultiHeadAttentionMML" and "recurrent" in plan["GRU"].reason
    assert plan["LSTM"].reason == "LSTM has no twin"
    ternary = ternarize(model, recurrent=True, verbose=False)
    gru, twin = model.get_layer("gru"), ternary.get_layer("gru")
    trits, _ = AbsmeanTernary().quantize(twin.cell.input_map.kernel)
    update, reset, candidate = np.split(array(gru.cell.kernel), 3, axis=-1)
    expected, _ = AbsmeanTernary().quantize(np.concatenate([update, candidate, reset], axis=-1))
    np.testing.assert_array_equal(array(trits), array(expected))
    np.testing.assert_allclose(array(twin.cell.output_map.kernel_quantizer(twin.cell.output_map.kernel)), np.eye(8), atol=1e-6)
    attention = model.layers[1]
    x = normal(3, 6, 16)
    first = attention.input[0] if isinstance(attention.input, list) else attention.input
    again = ternarize(keras.Model(first, attention.output), last=True, verbose=False)
    assert array(again(x)).shape == (3, 6, 16)
    correlation = np.corrcoef(array(again(x)).ravel(), array(attention(x, x)).ravel())[0, 1]
    assert correlation > 0.5


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("scale", ["tensor", "channel"])
def test_calibration_brings_outputs_closer(scale):
    model = shaken(keras.Sequential([keras.Input((32,)), *[layers.Dense(64, activation="relu") for _ in range(4)], layers.Dense(8)]))
    x = np.maximum(normal(500, 32), 0) + 0.3
    expected = array(model(x))
    errors = [
        np.square(array(ternarize(model, calibration=batch, scale=scale, verbose=False)(x)) - expected).mean() for batch in (None, x[:250])
    ]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.slow_to_compile
def test_mobilenet_is_converted_and_packed():
    model = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), classes=10, alpha=0.35)
    ternary = ternarize(model, filters=lambda layer: "depthwise" not in layer.name, verbose=False)
    kinds = [type(layer).__name__ for layer in ternary.layers]
    assert kinds.count("Conv2DMML") == 35 and kinds.count("DepthwiseConv2D") == 17 and kinds[-1] == "Dense"
    everything = ternarize(model, last=True, verbose=False)
    assert len(packable(everything)) == 53
    x = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype("float32")
    packed = pack(everything)
    np.testing.assert_allclose(array(packed(x)), array(everything(x)), atol=0.05)


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, dict(norm="rms", norm_gain=True, scale="channel")], ids=["plain", "normalised"])
@pytest.mark.parametrize("build", [mlp, convnet])
def test_back_to_standard_layers(build, options, packed, tmp_path, capsys):
    model = ternarize(shaken(build()), verbose=False, **options)
    for layer in model._flatten_layers():
        if getattr(layer, "gain", None) is not None:
            layer.gain.assign(1 + 0.1 * normal(*layer.gain.shape))
    model = pack(model) if packed else model
    x = normal(6, *model.input_shape[1:])
    expected, largest = array(model(x)), np.abs(array(model(x))).max()
    rounded = to_dense(model, quantize_inputs=True, sample=x)
    assert "largest difference" in capsys.readouterr().out
    difference = np.abs(array(rounded(x)) - expected)
    assert np.median(difference) < 1e-4 * largest and difference.max() < 0.1 * largest
    dense = to_dense(model)
    assert all(type(layer).__module__.startswith("keras.src") for layer in dense._flatten_layers())
    assert np.abs(array(dense(x)) - expected).max() < 0.2 * largest
    dense.compile("sgd", "mse")
    assert dense.trainable_weights and np.isfinite(dense.train_on_batch(x, expected))
    rounded.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(array(keras.saving.load_model(tmp_path / "m.keras")(x)), array(rounded(x)))


class Custom(layers.Layer):
    def __init__(self, argument=None, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, x):
        return self.dense(x)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4)

    def call(self, x):
        return self.dense(x)


def graph(*parts, shape=(4, 6)):
    return keras.Sequential([keras.Input(shape), *parts])


def masked(layer):
    return keras.Sequential([keras.Input((6,), dtype="int32"), layers.Embedding(10, 8, mask_zero=True), layer, layers.LSTM(4)])


def of_two_shapes(shared, first, second):
    a, b = keras.Input(first), keras.Input(second)
    pooled = [layers.Reshape((-1, 3))(shared(x)) for x in (a, b)]
    return keras.Model([a, b], layers.Concatenate()([layers.GlobalAveragePooling1D()(x) for x in pooled]))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ternarize(keras.Sequential([layers.Dense(3)])), "takes a built Sequential or functional model"),
        (lambda: ternarize(layers.Dense(3)), "of type Dense"),
        (lambda: ternarize(Subclassed()), "write their twins"),
        (lambda: ternarize(graph(layers.Dense(3, name="d"))), "has nothing to convert.\n  d (Dense): stays, the last layer"),
        (lambda: ternarize(graph(Custom(name="own"), layers.Dense(3))), "part of 'own', and Custom is not taken apart"),
        (lambda: ternarize(graph(layers.EinsumDense("abc,cde->abde", (None, 2, 3))), last=True), "only projections of the last axis"),
        (lambda: ternarize(graph(layers.Dense(3)), last=True, scale="row"), "Received: scale='row'"),
        (lambda: ternarize(graph(layers.Dense(3)), last=True, norms=None), "norms"),
        (lambda: ternarize(graph(layers.Dense(3)), filters=3, last=True), "`filters` must be a regular expression"),
        (lambda: ternarize(ternarize(graph(layers.Dense(3)), last=True, verbose=False), last=True), "ternary already"),
        (lambda: ternarize(mlp(), packed=True), "Received: ['packed']"),
        (lambda: ternarize(mlp(), filters="("), "`filters` must be a regular expression"),
        (lambda: ternarize(mlp(), calibration=normal(0, 12)), "an array of shape (0, 12)"),
        (lambda: ternarize(mlp(), calibration=np.full((2, 12), np.nan, "float32")), "a batch of finite inputs"),
        (lambda: ternarize(graph(Custom(argument=object(), name="own"), layers.Dense(3)), last=True), "'own' could not be copied"),
        (lambda: to_dense(mlp()), "has no ternary layer"),
        (lambda: to_dense(masked(matmul_free.DenseMML(3))), "would lose"),
        (lambda: to_dense(of_two_shapes(matmul_free.DenseMML(3), (5,), (4, 5))), "inputs of different ranks"),
        (lambda: to_dense(graph(matmul_free.DenseMML(3), matmul_free.GRUMML(3))), "Received: GRUMML"),
        (lambda: to_dense(graph(matmul_free.Conv1DMML(3, 2, padding="causal"))), "padding=\"causal\""),
        (lambda: to_dense(keras.Sequential([keras.Input((None, 3)), matmul_free.Conv1DMML(3, 2)])), "whose size must be known"),
        (lambda: to_dense("model"), "of type str"),
    ],
)  # fmt: skip
def test_what_cannot_work_says_why(make, message):
    with pytest.raises((ValueError, TypeError)) as error:
        make()
    assert message in str(error.value)


@pytest.mark.with_tensorflow
@pytest.mark.parametrize("copied", [lambda m: ternarize(m, verbose=False), pack, to_dense], ids=["ternarize", "pack", "to_dense"])
def test_vocabularies_are_copied(copied):
    lookup = layers.IntegerLookup()
    lookup.adapt(np.array([10, 20, 30]))
    hidden = matmul_free.DenseMML(4, norm=None) if copied in (pack, to_dense) else layers.Dense(4)
    model = keras.Sequential([keras.Input((1,), dtype="int64"), lookup, layers.Embedding(5, 4), layers.Flatten(), hidden, layers.Dense(2)])
    copy = copied(model)
    assert copy.layers[0].get_vocabulary() == lookup.get_vocabulary() and len(lookup.get_vocabulary()) == 4
    x = np.array([[10], [30]])
    assert np.abs(array(copy(x)) - array(model(x))).max() < np.abs(array(model(x))).max()


def test_functions_of_lambda_layers_are_copied():
    factor = 3.0
    model = graph(matmul_free.DenseMML(4, norm=None), layers.Lambda(lambda x: factor * x), layers.Dense(2), shape=(6,))
    x = normal(3, 6)
    np.testing.assert_allclose(array(pack(model)(x)), array(model(x)), atol=1e-5)


def test_what_is_shared_with_a_model_inside_stays_shared():
    def model(layer):
        inner = keras.Sequential([keras.Input((8,)), layer, layers.ReLU()])
        inputs = keras.Input((8,))
        return keras.Model(inputs, layers.Dense(2)(layer(inner(inputs))))

    x = normal(3, 8)
    floats, ours = model(layers.Dense(8)), model(matmul_free.DenseMML(8))
    ternary, packed, dense = ternarize(floats, verbose=False), pack(ours), to_dense(ours, quantize_inputs=True)
    assert len(ternary.weights) == len(floats.weights) and ternary.layers[1].layers[0] is ternary.layers[2]
    np.testing.assert_allclose(array(packed(x)), array(ours(x)), atol=1e-5)
    np.testing.assert_allclose(array(dense(x)), array(ours(x)), atol=1e-5)


def test_a_subclass_that_makes_its_own_graph_keeps_what_it_does():
    class Tenfold(keras.Model):
        def __init__(self, units=8, **kwargs):
            inputs = keras.Input((8,))
            super().__init__(inputs, layers.Dense(2)(matmul_free.DenseMML(units)(inputs)), **kwargs)
            self.units = units

        def call(self, inputs, training=None):
            return 10 * super().call(inputs)

        def get_config(self):
            return {"units": self.units}

    model, x = Tenfold(6), normal(3, 8)
    packed = pack(model)
    assert type(packed) is Tenfold
    np.testing.assert_allclose(array(packed(x)), array(model(x)), atol=1e-4)
    with pytest.raises(ValueError, match="takes a built Sequential or functional model"):
        ternarize(model)


def test_layers_that_are_quantised_or_adapted_otherwise():
    quantised = mlp()
    quantised.layers[0].quantize("int8")
    assert conversion_plan(quantised)[0].reason == "quantised already, to int8"
    adapted = mlp()
    adapted.layers[0].enable_lora(2)
    adapted.layers[0].lora_kernel_b.assign(normal(2, 16))
    whole = mlp()
    for layer, other in zip(whole.layers, adapted.layers, strict=True):
        layer.kernel.assign(other.kernel)
    kernels = [array(ternarize(m, verbose=False).layers[0].kernel) for m in (adapted, whole)]
    np.testing.assert_allclose(*kernels, rtol=1e-5)


def test_activations_may_be_functions_or_layers_with_weights():
    model = graph(layers.Dense(16, activation=layers.PReLU()), layers.Dense(8, activation=lambda x: x * x), layers.Dense(2), shape=(12,))
    model(normal(1, 12))  # builds it
    model.layers[0].activation.alpha.assign(np.full(16, 0.5, "float32"))
    ternary = ternarize(model, calibration=normal(20, 12), verbose=False)
    assert [row.becomes for row in conversion_plan(model)] == ["DenseMML", "DenseMML", None]
    assert ternary.layers[0].activation is not model.layers[0].activation
    np.testing.assert_array_equal(array(ternary.layers[0].activation.alpha), 0.5)
    assert ternary.layers[1].activation is model.layers[1].activation


@pytest.mark.parametrize("scale", ["tensor", "channel"])
@pytest.mark.parametrize("order", ["channels_last", "channels_first"])
@pytest.mark.parametrize("cls, arguments", [(layers.Conv2D, dict(filters=6)), (layers.DepthwiseConv2D, dict(depth_multiplier=2))])
def test_calibration_knows_where_the_channels_are(cls, arguments, order, scale):
    if BACKEND == "tensorflow" and order == "channels_first":
        pytest.skip("tensorflow has no convolutions with channels first on the CPU")
    x = normal(8, 9, 9, 4) if order == "channels_last" else normal(8, 4, 9, 9)
    convolution = cls(kernel_size=3, padding="same", data_format=order, **arguments)
    model = shaken(graph(convolution, layers.Flatten(), layers.Dense(2), shape=x.shape[1:]))
    fitted = [ternarize(model, calibration=batch, scale=scale, verbose=False).layers[0] for batch in (None, x)]
    errors = [np.square(array(layer(x)) - array(model.layers[0](x))).mean() for layer in fitted]
    assert errors[1] <= errors[0] * 1.0001


@pytest.mark.slow_to_compile
def test_calibration_sums_over_all_calls():
    x = normal(50, 5, 4) + np.arange(5, dtype="float32")[None, :, None]
    once = shaken(graph(layers.Dense(16, activation="relu"), layers.Dense(3), shape=(5, 4)))
    steps = graph(layers.TimeDistributed(layers.Dense(16, activation="relu")), layers.Dense(3), shape=(5, 4))
    steps.set_weights(once.get_weights())
    plain, distributed = (ternarize(m, calibration=x, verbose=False) for m in (once, steps))
    np.testing.assert_allclose(array(distributed.layers[0].layer.kernel), array(plain.layers[0].kernel), rtol=1e-3)
    np.testing.assert_allclose(array(distributed.layers[0].layer.bias), array(plain.layers[0].bias), rtol=1e-3, atol=1e-5)


def test_all_heads_and_distributed_ends_are_last_layers():
    inputs = keras.Input((4,))
    h = layers.Dense(8, name="h")(inputs)
    model = keras.Model(inputs, layers.Concatenate()([layers.Dense(2, name="a")(h), layers.Dense(2, name="b")(h)]))
    assert {row.path: row.becomes for row in conversion_plan(model)} == {"h": "DenseMML", "a": None, "b": None}
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(8, name="first"), layers.Dense(3, name="out")], name="inner")
    plan = {row.layer.name: row.becomes for row in conversion_plan(graph(layers.TimeDistributed(inner), shape=(5, 4)))}
    assert plan == {"first": "DenseMML", "out": None}


@pytest.mark.slow_to_compile
def test_standard_layers_of_shared_frozen_and_many_ended_models(capsys):
    shared = matmul_free.DenseMML(3)
    model = of_two_shapes(shared, (7, 5), (4, 5))
    x = [normal(2, 7, 5), normal(2, 4, 5)]
    dense = to_dense(model, quantize_inputs=True)
    np.testing.assert_allclose(array(dense(x)), array(model(x)), atol=1e-5)
    frozen = to_dense(graph(matmul_free.DenseMML(8, trainable=False), matmul_free.DenseMML(2), shape=(4,)))
    assert [w.shape[-1] for w in frozen.trainable_weights] == [2, 2]
    inputs = keras.Input((4,))
    h = matmul_free.DenseMML(7)(inputs)
    heads = keras.Model(inputs, {"a": layers.Dense(2)(h), "b": layers.Dense(3)(h)})
    to_dense(heads, quantize_inputs=True, sample=normal(3, 4))
    assert "largest difference of the outputs" in capsys.readouterr().out


copied = pytest.mark.parametrize("copied", [lambda m: ternarize(m, verbose=False), pack, to_dense], ids=["ternarize", "pack", "to_dense"])


def hidden(copied, **arguments):
    "A layer that the conversion is about."
    return layers.Dense(8, **arguments) if copied not in (pack, to_dense) else matmul_free.DenseMML(8, norm=None, **arguments)


@copied
def test_what_normalizations_have_adapted_to_is_copied(copied):
    x = 5 + 3 * normal(20, 6)
    normalization = layers.Normalization()
    normalization.adapt(x)
    model = keras.Sequential([keras.Input((6,)), normalization, hidden(copied), layers.Dense(2)])
    copy = copied(model)
    np.testing.assert_array_equal(array(copy.layers[0](x)), array(normalization(x)))
    normalization.adapt(x + 100)
    assert abs(array(copy.layers[0](x)).mean()) < 0.1


@pytest.mark.with_tensorflow
@copied
@pytest.mark.parametrize("lookup", [layers.IntegerLookup, layers.TextVectorization])
def test_weighted_vocabularies_are_copied(copied, lookup):
    words = np.array([["7"], ["7"], ["8"]]) if lookup is layers.TextVectorization else np.array([[7], [7], [8]])
    lookup = lookup(output_mode="tf_idf")
    lookup.adapt(words)
    inputs = keras.Input((1,), dtype="string" if words.dtype.kind == "U" else "int64")
    model = keras.Sequential([inputs, lookup, hidden(copied), layers.Dense(2)])
    copy = copied(model)
    assert copy.layers[0].get_vocabulary() == lookup.get_vocabulary()
    np.testing.assert_array_equal(array(copy.layers[0](words)), array(lookup(words)))
    assert array(lookup(words)).max() > 0.1


class Counter(layers.Layer):
    "It keeps, beside a weight, a number that is no variable."

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = 0
        self.factor = None

    def build(self, input_shape):
        self.factor = self.add_weight(name="factor", shape=(), initializer="ones")

    def call(self, x):
        return x * self.factor

    def save_own_variables(self, store):
        store["factor"], store["calls"] = self.factor, self.calls

    def load_own_variables(self, store):
        self.factor.assign(store["factor"])
        self.calls = int(np.asarray(store["calls"]))


class Outer(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = [Counter(), layers.BatchNormalization()]
        self.average = keras.metrics.Mean()

    def call(self, x):
        for layer in self.inner:
            x = layer(x)
        return x


@copied
def test_layers_are_copied_by_their_own_hooks(copied):
    outer = Outer()
    model = keras.Sequential([keras.Input((6,)), outer, hidden(copied), layers.Dense(2)])
    outer.inner[0].calls = 17
    outer.inner[0].factor.assign(3.0)
    outer.inner[1].moving_mean.assign(np.arange(6.0))
    outer.average.update_state([2.0, 4.0])
    copy = copied(model).layers[0]
    outer.inner[0].factor.assign(5.0)
    assert copy.inner[0].calls == 17 and array(copy.inner[0].factor) == 3 and array(copy.average.result()) == 3
    np.testing.assert_array_equal(array(copy.inner[1].moving_mean), np.arange(6))


@copied
def test_quantised_and_adapted_layers_that_stay_are_copied(copied):
    embedded = [keras.Input((6,)), layers.Embedding(9, 4), layers.Flatten()]
    model = keras.Sequential([*embedded, hidden(copied), layers.Dense(4), layers.Dense(2)])
    model.layers[0].quantize("int8")
    model.layers[3].quantize("int4")
    model.layers[4].enable_lora(2)
    model.layers[4].lora_kernel_b.assign(normal(2, 2))
    copy = copied(model)
    x = np.arange(12).reshape(2, 6) % 9
    np.testing.assert_array_equal(array(copy.layers[0](x)), array(model.layers[0](x)))
    assert copy.layers[0].quantization_mode == "int8" and copied not in (pack, to_dense) or copy.layers[3].quantization_mode == "int4"
    h = normal(3, 4)
    np.testing.assert_array_equal(array(copy.layers[4](h)), array(model.layers[4](h)))
    np.testing.assert_array_equal(array(copy.layers[4].lora_kernel_b), array(model.layers[4].lora_kernel_b))  # and trains on from there


def test_a_copy_of_a_copy_shares_no_memory():
    from keras_mml.copies import copy_of

    model = mlp()
    copy = copy_of(model)
    before = array(copy.layers[0].kernel)
    model.compile("sgd", "mse")
    model.fit(normal(8, 12), normal(8, 3), verbose=0)
    np.testing.assert_array_equal(array(copy.layers[0].kernel), before)
    copy.compile("sgd", "mse")
    copy.fit(normal(8, 12), normal(8, 3), verbose=0)
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4)])
    frozen = keras.Sequential([keras.Input((4,)), inner, layers.Dense(2)])
    frozen.trainable, inner.layers[0].trainable = False, True
    assert [copy_of(frozen).trainable, copy_of(frozen).layers[0].layers[0].trainable] == [False, True]
    inputs = keras.Input((4,))
    functional = keras.Model(inputs, layers.Dense(2)(inputs))
    functional.trainable = False
    assert not copy_of(functional).trainable


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, dict(norm=None), dict(norm_gain=True)], ids=["rms", "none", "gain"])
def test_what_time_distributed_holds_becomes_standard(options, packed):
    model = graph(layers.TimeDistributed(matmul_free.DenseMML(8, **options)), layers.TimeDistributed(layers.Dense(2)), shape=(5, 12))
    model = pack(model) if packed else model
    x = normal(3, 5, 12)
    rounded, dense = to_dense(model, quantize_inputs=True), to_dense(model)
    np.testing.assert_allclose(array(rounded(x)), array(model(x)), atol=1e-5)
    assert np.abs(array(dense(x)) - array(model(x))).max() < 0.05 * np.abs(array(model(x))).max()


def test_what_time_distributed_holds_becomes_ternary():
    model = graph(
        layers.TimeDistributed(layers.DepthwiseConv2D(3)),
        layers.TimeDistributed(layers.Reshape((3, 9))),
        layers.TimeDistributed(layers.GRU(8)),
        layers.TimeDistributed(layers.Dense(6)),
        layers.Dense(2),
        shape=(4, 5, 5, 3),
    )
    ternary = ternarize(model, recurrent=True, norm="rms", norm_gain=True, verbose=False)
    inside = [layer.layer for layer in ternary.layers[:-1]]
    assert [type(layer).__name__ for layer in inside] == ["DepthwiseConv2DMML", "Reshape", "GRUMML", "DenseMML"]
    assert inside[0].gain is not None and tuple(ternary(normal(2, 4, 5, 5, 3)).shape) == (2, 4, 2)
    trits, _ = AbsmeanTernary().quantize(inside[3].kernel)
    np.testing.assert_array_equal(array(trits), array(AbsmeanTernary().quantize(model.layers[3].layer.kernel)[0]))


class Twice(layers.Wrapper):
    def call(self, x):
        return self.layer(self.layer(x))


@pytest.mark.slow_to_compile
def test_other_wrappers_are_copied_and_not_taken_apart():
    inside, x = matmul_free.DenseMML(6), normal(3, 4, 6)
    model = graph(inside, Twice(inside, name="twice"), layers.Bidirectional(matmul_free.GRUMML(4), name="both"))
    packed = pack(model)
    assert packed.layers[1].layer is packed.layers[0]
    np.testing.assert_allclose(array(packed(x)), array(model(x)), atol=5e-3)
    floats = graph(Twice(layers.Dense(6), name="twice"), layers.Bidirectional(layers.GRU(4), name="both"), layers.Dense(3), layers.Dense(2))
    ternary = ternarize(floats, recurrent=True, verbose=False)
    assert [type(layer) for layer in ternary.layers] == [Twice, layers.Bidirectional, matmul_free.DenseMML, layers.Dense]
    reasons = {row.reason.split("and ")[-1] for row in conversion_plan(floats)[:3]}
    assert reasons == {"Twice is not taken apart", "Bidirectional is not taken apart"}
    for model in (graph(Twice(matmul_free.DenseMML(6))), graph(layers.Bidirectional(matmul_free.GRUMML(4)), matmul_free.DenseMML(2))):
        with pytest.raises(ValueError, match="no namesake among Keras' layers, and is not taken apart"):
            to_dense(model)


@copied
def test_activations_initializers_regularizers_and_constraints_need_no_file(copied):
    class Own(keras.initializers.Initializer, keras.regularizers.Regularizer, keras.constraints.Constraint):
        def __init__(self, argument):
            self.argument = argument

        def __call__(self, x, dtype=None):
            return x if ops.is_tensor(x) else ops.ones(x, dtype)

    def relu(x):
        return 3 * x  # and not that of Keras

    source = "lambda x: x * x"  # of which Python finds no text
    for activation in (relu, eval(source), functools.partial(ops.multiply, 2.0)):
        own = [Own(i) for i in range(3)]
        arguments = dict(kernel_initializer=own[0], kernel_constraint=own[1])
        if keras.__version__ >= "3.15":  # earlier ones take no functions
            arguments |= dict(kernel_regularizer=lambda w: 0 * ops.sum(w), bias_constraint=lambda w: w)
        layer = hidden(copied, activation=activation, bias_regularizer=own[2], **arguments)
        model = keras.Sequential([keras.Input((6,)), layer, layers.Dense(2)])
        copies = [copied(model).layers[0], *([layer.pack()] if copied is pack else [])]
        for copy in copies:
            assert copy.activation is activation and layer.activation is activation
            assert all(getattr(copy, name) is value for name, value in arguments.items()) and copy.bias_regularizer is own[2]


@pytest.mark.parametrize("kind", ["dense", "conv", "depthwise", "recurrent"])
def test_activations_with_weights_are_copied(kind):
    make, shape = {
        "dense": (lambda **k: matmul_free.DenseMML(8, **k), (5, 6)),
        "conv": (lambda **k: matmul_free.Conv2DMML(8, 2, **k), (5, 6, 3)),
        "depthwise": (lambda **k: matmul_free.DepthwiseConv2DMML(2, **k), (5, 6, 3)),
        "recurrent": (lambda **k: matmul_free.GRUMML(8, **k), (5, 6)),
    }[kind]
    layer, x = make(activation=layers.PReLU(shared_axes=list(range(1, len(shape))))), normal(3, *shape)
    model = keras.Sequential([keras.Input(shape), layer])
    model(x)
    (alpha,) = (w for w in model.weights if w.name == "alpha")
    alpha.assign(ops.full(alpha.shape, 0.5))
    copies = [pack(model), pack(layer)]
    if kind != "recurrent":
        copies += [layer.pack(), to_dense(model), to_dense(pack(model), quantize_inputs=True)]
    for copy in copies:
        copy(x)
        assert [array(w).min() for w in copy.weights if w.name == "alpha"] == [0.5]
    np.testing.assert_allclose(array(copies[-1](x)), array(model(x)), atol=1e-5)


def test_the_plan_says_what_is_lost(capsys):
    gru = layers.GRU(
        8, kernel_regularizer="l2", bias_constraint="non_neg", recurrent_regularizer="l1", dropout=0.1, recurrent_dropout=0.2,
        recurrent_constraint="max_norm", name="gru"
    )  # fmt: skip
    model = graph(gru, layers.Dense(2))
    twin = ternarize(model, recurrent=True).layers[0]
    assert "gru (GRU): → GRUMML, without its recurrent_regularizer, recurrent_constraint, recurrent_dropout\n" in capsys.readouterr().out
    assert isinstance(twin.cell.input_map.kernel_regularizer, keras.regularizers.L2) and twin.dropout == 0.1
    assert isinstance(twin.cell.input_map.bias_constraint, keras.constraints.NonNeg)
    grouped = layers.GroupQueryAttention(4, 2, 1, activity_regularizer="l2")
    for attention in (layers.MultiHeadAttention(2, 4, activity_regularizer="l2"), grouped):
        inputs = keras.Input((4, 6))
        model = keras.Model(inputs, layers.Dense(2)(attention(inputs, inputs)))
        ternary = ternarize(model, verbose=False)
        ternary(normal(2, 4, 6))
        assert len(ternary.losses) == 4  # of queries, keys, values and outputs
    assert not any(row.lost for row in conversion_plan(graph(layers.GRU(8), layers.Dense(2)), recurrent=True))


def test_calibration_needs_a_batch():
    import itertools

    class Data(keras.utils.PyDataset):
        pass

    for wrong in (iter([normal(2, 12)]), (normal(2, 12) for _ in itertools.count()), Data()):
        with pytest.raises(ValueError, match="must be one batch of inputs: .* Received: .* of type (list_iterator|generator|Data)"):
            ternarize(mlp(), calibration=wrong, verbose=False)


@pytest.mark.parametrize("join", [layers.Add(), layers.Average(), layers.Multiply(), lambda xs: xs[0] + xs[1], lambda xs: ops.maximum(*xs)])
def test_heads_that_are_joined_are_last_layers(join):
    inputs = keras.Input((4,))
    h = layers.Dense(8, name="h")(inputs)
    model = keras.Model(inputs, layers.Softmax()(join([layers.Dense(2, name="a")(h), layers.Dense(2, name="b")(h)])))
    assert {row.path: row.becomes for row in conversion_plan(model)} == {"h": "DenseMML", "a": None, "b": None}
    h = layers.Dense(2, name="h")(inputs)
    model = keras.Model(inputs, join([h, layers.Dense(2, name="last")(h)]))  # what goes past a layer is read by it
    assert {row.path: row.becomes for row in conversion_plan(model)} == {"h": "DenseMML", "last": None}


def test_the_plan_of_another_model_is_refused_as_its_conversion():
    for function in (conversion_plan, ternarize):
        with pytest.raises(ValueError, match=f"`{function.__name__}` takes a built Sequential or functional model.* write their twins"):
            function(Subclassed())


@keras.saving.register_keras_serializable(package="tests")
class Holder(layers.Layer):
    "Applies the embedding or the layer that it was given, which may be in other places of a model, too."

    def __init__(self, held, **kwargs):
        super().__init__(**kwargs)
        self.held = held

    def call(self, x):
        return x @ ops.transpose(self.held.embeddings) if isinstance(self.held, layers.Embedding) else self.held(x)

    def get_config(self):
        return {**super().get_config(), "held": keras.saving.serialize_keras_object(self.held)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("held")), **config)


class Scaled(layers.Layer):
    "An activation with a weight, of a class that Keras does not know."

    def build(self, shape):
        self.factor = self.add_weight(shape=shape[-1:], initializer="ones")

    def call(self, x):
        return x * self.factor


def tied(layer):
    tokens, embedding = keras.Input((4,), dtype="int32"), layers.Embedding(10, 8)
    return keras.Model(tokens, Holder(embedding)(layer(embedding(tokens)))), np.arange(8, dtype="int32").reshape(2, 4)


@copied
def test_a_tied_embedding_stays_tied(copied):
    model, _ = tied(hidden(copied))
    copy = copied(model)
    assert copy.layers[-1].held is copy.layers[1]
    np.testing.assert_array_equal(array(copy.layers[1].embeddings), array(model.layers[1].embeddings))


def test_a_tied_model_is_packed_and_saved(tmp_path):
    model, x = tied(matmul_free.DenseMML(8))
    packed = pack(model)
    np.testing.assert_allclose(array(packed(x)), array(model(x)), atol=1e-5)
    packed.save(tmp_path / "tied.keras")
    np.testing.assert_allclose(array(keras.models.load_model(tmp_path / "tied.keras")(x)), array(packed(x)), atol=1e-6)


@pytest.mark.parametrize("activation", [layers.PReLU, Scaled])
def test_an_activation_of_two_layers_stays_one(activation):
    activation, x = activation(), normal(5, 4)
    both = [matmul_free.DenseMML(6, activation=activation) for _ in range(2)]
    model = keras.Sequential([keras.Input((4,)), *both, matmul_free.DenseMML(2)])
    model(x)
    activation.weights[0].assign(normal(6))
    packed, dense = pack(model), to_dense(model, quantize_inputs=True)
    assert packed.layers[0].activation is packed.layers[1].activation is not activation
    for copy in (packed, dense):
        np.testing.assert_allclose(array(copy(x)), array(model(x)), atol=1e-5)


@pytest.mark.parametrize("inner", [matmul_free.DenseMML, layers.Dense])
def test_a_layer_in_several_layers_stays_one(inner):
    shared, inputs, x = inner(6), keras.Input((6,)), normal(5, 6)
    model = keras.Model(inputs, matmul_free.DenseMML(6)(Holder(shared)(ops.relu(Holder(shared)(inputs)))))
    packed = pack(model)
    assert len(packed.weights) == len(pack(model, in_place=True).weights)
    np.testing.assert_allclose(array(packed(x)), array(model(x)), atol=1e-5)


def test_a_layer_that_loses_what_it_shares_is_refused():
    class Maker(layers.Layer):
        "Makes a layer if it is given none, and does not tell that it was given one."

        def __init__(self, held=None, **kwargs):
            super().__init__(**kwargs)
            self.held = held or layers.Dense(6)

        def call(self, x):
            return self.held(x)

        def get_config(self):
            return super().get_config()

    shared, inputs = layers.Dense(6), keras.Input((6,))
    model = keras.Model(inputs, matmul_free.DenseMML(2)(Maker(shared)(shared(inputs))))
    with pytest.raises(ValueError, match="several layers share it"):
        pack(model)
    pack(model, in_place=True)


@pytest.mark.parametrize("attention", [layers.MultiHeadAttention, layers.GroupQueryAttention])
@pytest.mark.parametrize("options", [{}, {"scale": "channel", "norm": "rms"}])
def test_attention_with_several_heads_is_calibrated(attention, options):
    inputs, x = keras.Input((5, 8)), normal(30, 5, 8)
    layer = attention(2, 4) if attention is layers.MultiHeadAttention else attention(4, 4, 2)
    model = shaken(keras.Model(inputs, layer(inputs, inputs)))
    expected = array(model(x))
    copies = [ternarize(model, calibration=batch, last=True, verbose=False, **options) for batch in (None, x)]
    errors = [np.square(array(copy(x)) - expected).mean() for copy in copies]
    assert errors[1] < errors[0]


def test_layers_within_two_wrappers_become_ternary():
    model = keras.Sequential([keras.Input((3, 4, 6)), layers.TimeDistributed(layers.TimeDistributed(layers.Dense(5))), layers.Dense(2)])
    ternary = ternarize(model, verbose=False)
    assert type(ternary.layers[0].layer.layer) is matmul_free.DenseMML and type(ternary.layers[1]) is layers.Dense
    assert ternary(normal(2, 3, 4, 6)).shape == (2, 3, 4, 2)


def test_a_kernel_that_a_wrapper_divides_cannot_be_packed():
    model = keras.Sequential([keras.Input((4,)), layers.SpectralNormalization(matmul_free.DenseMML(6)), matmul_free.DenseMML(2)])
    with pytest.raises(ValueError, match="divides the float kernel"):
        pack(model)
    assert not model.layers[1].packed
