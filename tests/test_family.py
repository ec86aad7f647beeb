"""What must hold for every layer: Keras' conventions, training, saving, resuming, packing, and use in models of every kind."""

import inspect
import json

import keras
import numpy as np
import pytest
from keras import ops
from keras.src import testing

from keras_mml import layers, pack
from keras_mml.layers import *  # noqa: F403
from keras_mml.layers import DenseMML, MultiHeadAttentionMML, TransformerBlockMML
from keras_mml.layers.packed import PackableLayer
from keras_mml.layers.recurrent import ScanRNN

BACKEND = keras.backend.backend()


class Case:
    "A layer, what it is fed with, and what is expected of it."

    def __init__(self, cls, arguments, input_shape, output_shape, weights, tokens=0, masks=True, losses=None):
        self.cls, self.arguments, self.input_shape, self.output_shape = cls, arguments, input_shape, output_shape
        self.weights, self.tokens, self.masks = weights, tokens, masks
        self.name = cls.__name__ + "".join(f" {k}={v}" for k, v in arguments.items() if k not in ("units", "filters", "kernel_size"))

    def make(self, **arguments):
        return self.cls(**self.arguments, **arguments)

    def apply(self, layer, x):
        y = layer(x, x) if self.cls is MultiHeadAttentionMML else layer(x)
        return y[0] if isinstance(y, (tuple, list)) else y

    def data(self, rows=None, seed=0):
        shape = (rows or self.input_shape[0], *self.input_shape[1:])
        rng = np.random.default_rng(seed)
        return rng.integers(1, self.tokens, shape) if self.tokens else rng.normal(size=shape).astype("float32")

    def input(self):
        return keras.Input(self.input_shape[1:], dtype="int32" if self.tokens else "float32")

    def model(self, **arguments):
        "The layer in a model that can be trained."
        x = inputs = self.input()
        if len(self.input_shape) == 3 and not self.tokens:
            x = RMSNorm()(x)
        x = keras.layers.Flatten()(self.apply(self.make(**arguments), x))
        model = keras.Model(inputs, keras.layers.Dense(2)(x))
        model.compile(keras.optimizers.Adam(0.01), "mse")
        return model


T, S, I = (2, 6, 8), (2, 16, 8), (2, 8, 8, 4)
CASES = [
    Case(DenseMML, dict(units=5), (2, 8), (2, 5), 2),
    Case(GLUMML, dict(units=5), (2, 8), (2, 5), 4),
    Case(BilinearMML, dict(units=5, intermediate_size=16), T, (2, 6, 5), 4),
    Case(ReGLUMML, dict(units=5, intermediate_size=16, use_bias=False), T, (2, 6, 5), 2),
    Case(GeGLUMML, dict(units=5, intermediate_size=16), T, (2, 6, 5), 4),
    Case(SeGLUMML, dict(units=5, hidden_ratio=2), T, (2, 6, 5), 4),
    Case(SwiGLUMML, dict(units=5, intermediate_size=16, scale="channel", norm_gain=True), T, (2, 6, 5), 6),
    Case(GRUMML, dict(units=6), T, (2, 6), 6),
    Case(GRUMML, dict(units=6, fully_mml=True, num_heads=2, return_sequences=True), T, (2, 6, 6), 4),
    Case(GRUMML, dict(units=6, fully_mml=True, forget_lower_bound=0.5, learn_lower_bound=True, go_backwards=True), T, (2, 6), 5),
    Case(GRUMML, dict(units=6, use_bias=False, unroll=True), T, (2, 6), 3),
    Case(LRUMML, dict(units=5, state_dim=7), T, (2, 5), 6),
    Case(LRUMML, dict(units=5, state_dim=7, fully_mml=True, use_bias=True, return_sequences=True), T, (2, 6, 5), 8),
    Case(AttentionMML, dict(num_heads=2, out_dim=6), T, (2, 6, 6), 4),
    Case(AttentionMML, dict(num_heads=2, out_dim=6, fully_mml=False, causal=False), T, (2, 6, 6), 12),
    Case(TransformerBlockMML, dict(embedding_dim=8, ffn_dim=16, num_heads=2, rate=0.0), T, T, 10),
    Case(TransformerBlockMML, dict(embedding_dim=8, ffn_dim=16, num_heads=2, rate=0.0, mixer="softmax", causal=False), T, T, 14),
    Case(TokenEmbedding, dict(max_len=9, vocab_size=11, embedding_dim=5), (2, 6), (2, 6, 5), 1, tokens=11),
    Case(TokenEmbedding, dict(max_len=9, vocab_size=11, embedding_dim=5, with_positions=True), (2, 6), (2, 6, 5), 2, tokens=11),
    Case(PatchEmbedding, dict(num_patches=6, embedding_dim=5, with_positions=True), T, (2, 6, 5), 3),
    Case(PatchEmbedding, dict(num_patches=6, embedding_dim=5, use_mml=False), T, (2, 6, 5), 2),
    Case(Patches, dict(patch_size=4), I, (2, 4, 64), 0, masks=False),
    Case(Conv1DMML, dict(filters=5, kernel_size=3, padding="causal", dilation_rate=2), S, (2, 16, 5), 2, masks=False),
    Case(Conv1DMML, dict(filters=6, kernel_size=3, groups=2, strides=2), S, (2, 7, 6), 2, masks=False),
    Case(Conv2DMML, dict(filters=5, kernel_size=3, padding="same", norm_gain=True), I, (2, 8, 8, 5), 3, masks=False),
    Case(Conv2DMML, dict(filters=5, kernel_size=(2, 3), strides=2, scale="channel", use_bias=False), I, (2, 4, 3, 5), 1, masks=False),
    Case(DepthwiseConv2DMML, dict(kernel_size=3, depth_multiplier=2), I, (2, 6, 6, 8), 2, masks=False),
    Case(RMSNorm, dict(use_bias=True), (2, 8), (2, 8), 2),
]  # fmt: skip
# Layers that take two inputs, which Sequential and TimeDistributed cannot give them.
ATTENTION = [
    Case(MultiHeadAttentionMML, dict(num_heads=2, key_dim=4), T, T, 8),
    Case(MultiHeadAttentionMML, dict(num_heads=4, key_dim=4, num_key_value_heads=2, rotary=True, fully_mml=False, use_bias=False), T, T, 4),
]


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


every_case = each(CASES + ATTENTION)
ternary_cases = each([c for c in CASES + ATTENTION if c.cls not in (TokenEmbedding, Patches, RMSNorm) and c.arguments.get("use_mml", True)])


def array(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def test_no_layer_is_forgotten():
    exported = {getattr(layers, name) for name in layers._all_}
    cells = {layers.GRUCellMML, layers.LRUCellMML}  # which have a test of their own
    assert exported - cells == {case.cls for case in CASES + ATTENTION}


class ConformanceTest(testing.TestCase):
    def check(self, case, packed=False):
        self.run_layer_test(
            case.cls,
            init_kwargs={**case.arguments, "packed": True} if packed else case.arguments,
            input_shape=case.input_shape,
            input_dtype="int32" if case.tokens else "float32",
            expected_output_shape=case.output_shape,
            expected_num_trainable_weights=None if packed else case.weights,
            supports_masking=case.masks,
            run_training_check=not packed and case.weights > 0 and not case.tokens,
            run_mixed_precision_check=not case.tokens,
        )

    def test_every_layer(self):
        for case in CASES:
            with self.subTest(case.name):
                self.check(case)

    def test_every_packed_layer(self):
        for case in CASES:
            if hasattr(case.cls(**case.arguments), "packed") and case.arguments.get("use_mml", True):
                with self.subTest(case.name):
                    self.check(case, packed=True)

    def test_attention(self):
        x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype("float32")
        for arguments, weights in [
            (dict(num_heads=2, key_dim=4), 8),
            # On jax, Keras' attention wants values as long as keys.
            (dict(num_heads=4, key_dim=2, num_key_value_heads=2, rotary=True, use_bias=False, value_dim=2 if BACKEND == "jax" else 3), 4),
            (dict(num_heads=2, key_dim=4, fully_mml=False, dropout=0.0, output_shape=6), 8),
        ]:
            self.run_layer_test(
                layers.MultiHeadAttentionMML,
                init_kwargs=arguments,
                input_shape={"query_shape": (2, 4, 6), "value_shape": (2, 4, 6)},
                expected_output_shape=(2, 4, 6),
                expected_num_trainable_weights=weights,
                supports_masking=True,
                run_training_check=False,
            )
            layer = layers.MultiHeadAttentionMML(**arguments)
            layer(x, x)
            packed = pack(layer)
            difference = np.abs(array(packed(x, x)) - array(layer(x, x)))
            assert (difference < 1e-3).mean() > 0.9 and difference.max() < 0.2

    def test_cells(self):
        x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype("float32")
        for cell, states in [
            (layers.GRUCellMML(6, num_heads=2, fully_mml=True), [(2, 3), (2, 3)]),
            (layers.LRUCellMML(5, 7), [(2, 7), (2, 7)]),
        ]:
            rnn = keras.layers.RNN(cell, return_state=True)
            output, *end = rnn(x)
            assert [tuple(s.shape) for s in end] == states and tuple(output.shape) == (2, cell.units)
            symbolic = rnn(keras.Input((5, 8)))
            assert [tuple(s.shape) for s in symbolic] == [(None, cell.units), *[(None, s[1]) for s in states]]
            config = json.loads(json.dumps(cell.get_config()))
            assert type(cell).from_config(config).get_config() == cell.get_config()
            stacked = keras.layers.RNN([type(cell).from_config(config), layers.GRUCellMML(3)])
            assert tuple(stacked(x).shape) == (2, 3)


@every_case
def test_the_configuration_names_every_argument_and_survives_json(case):
    layer = case.make()
    config = json.loads(json.dumps(layer.get_config()))
    parameters = {name for name, p in inspect.signature(case.cls.__init__).parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    assert parameters - {"self"} <= set(config)
    assert case.cls.from_config(config).get_config() == layer.get_config()


def one_epoch(model, case, seed):
    x, y = case.data(rows=32, seed=3), np.random.default_rng(4).normal(size=(32, 2)).astype("float32")
    order = np.random.default_rng(seed).permutation(32)
    model.fit(x[order], y[order], batch_size=8, epochs=1, shuffle=False, verbose=0)


def shaken(model, size):
    "The model with noise on every weight: zeros, such as biases start with, stop gradients, and exact halves may be rounded either way."
    rng = np.random.default_rng(1)
    for weight in model.trainable_weights:
        weight.assign(weight + size * rng.normal(size=weight.shape))
    return model


@every_case
def test_every_weight_trains_and_a_saved_model_goes_on_bit_for_bit(case, tmp_path):
    keras.utils.set_random_seed(7)
    model, x = shaken(case.model(), 0.05), case.data()
    start = [array(v) for v in model.trainable_variables]
    one_epoch(model, case, seed=1)
    for variable, old in zip(model.trainable_variables, start):  # Adam moves whatever has a gradient
        if variable.path.endswith("key/bias"):  # adds the same to all scores of a query, so softmax does not see it
            continue
        assert np.isfinite(array(variable)).all() and not np.array_equal(array(variable), old), variable.path
    model.save(tmp_path / "m.keras")
    resumed = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(array(resumed(x)), array(model(x)))
    before = [array(v) for v in resumed.trainable_variables]
    one_epoch(model, case, seed=2), one_epoch(resumed, case, seed=2)
    for uninterrupted, continued in zip([*model.variables, *model.optimizer.variables], [*resumed.variables, *resumed.optimizer.variables]):
        np.testing.assert_array_equal(array(continued), array(uninterrupted))
    assert any((a != array(b)).any() for a, b in zip(before, resumed.trainable_variables))  # and it did train


@ternary_cases
def test_packed_models_predict_the_same_and_are_saved(case, tmp_path):
    keras.utils.set_random_seed(0)
    model, x = shaken(case.model(), 0.01), case.data(rows=16)
    expected = array(model(x))
    packed = pack(model)
    ternary = [layer for layer in packed._flatten_layers() if isinstance(layer, PackableLayer)]
    assert ternary and all(layer.packed for layer in ternary) and not any(w.name == "kernel" for l in ternary for w in l.weights)
    outputs = array(packed(x))
    scale = np.abs(expected).max()
    # float rounding, but for inputs on the edge between two integers, whose step is carried through the layers behind
    assert np.median(np.abs(outputs - expected)) < 1e-3 * scale and np.abs(outputs - expected).max() < 0.1 * scale

    packed.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert all(layer.packed for layer in loaded._flatten_layers() if isinstance(layer, PackableLayer))
    np.testing.assert_array_equal(array(loaded(x)), outputs)
    packed.save_weights(tmp_path / "m.weights.h5")
    other = case.model()
    other.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(array(other(x)), outputs)
    clone = keras.models.clone_model(packed)
    clone.set_weights(packed.get_weights())
    np.testing.assert_array_equal(array(clone(x)), outputs)
    np.testing.assert_array_equal(array(packed(x, training=True)), outputs)  # as in the `fit` of a model around it


@each(CASES)
def test_clones_and_containers(case):
    "Clones, Sequential, TimeDistributed and subclassed models."
    model, x = case.model(), case.data()
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(array(clone(x)), array(model(x)))
    layer = case.make()
    sequential = keras.Sequential([case.input(), layer])
    expected = array(sequential(x))
    distributed = array(keras.layers.TimeDistributed(layer)(np.stack([x, x], axis=1)))
    np.testing.assert_allclose(distributed, np.stack([expected, expected], axis=1), rtol=1e-4, atol=1e-4)

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = [layer]

        def call(self, x):
            return self.parts[0](x)

    np.testing.assert_allclose(array(Subclassed()(x)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(BACKEND == "torch", reason="torch compiles with a C++ compiler and minutes of time; Keras' default there is not to")
@every_case
def test_compiled_as_a_whole(case):
    if BACKEND == "tensorflow" and case.arguments.get("groups", 1) > 1 and case.weights:
        pytest.skip("tensorflow has no gradient of grouped convolutions on a CPU without XLA")
    model, x = case.model(), case.data(rows=16)
    expected = array(model(x))
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=True)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=0.05, atol=0.05)
    losses = [float(model.train_on_batch(x, np.ones((16, 2), "float32"))) for _ in range(10)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
@every_case
def test_mixed_precision_keeps_float32_weights_and_trains(case, dtype):
    if BACKEND == "jax" and dtype == "mixed_float16" and (case.cls is MultiHeadAttentionMML or case.arguments.get("mixer") == "softmax"):
        pytest.skip("jax has no attention in float16 on a CPU")
    keras.utils.set_random_seed(0)
    model, x = case.model(dtype=dtype), case.data(rows=16)
    layer = next(layer for layer in model.layers if type(layer) is case.cls and (layer.dtype_policy.name == dtype))
    assert all(keras.backend.standardize_dtype(w.dtype) == "float32" for w in layer.weights)
    assert keras.backend.standardize_dtype(case.apply(layer, x).dtype) == layer.compute_dtype
    model.train_on_batch(x, np.ones((16, 2), "float32"))
    assert np.isfinite(array(model(x))).all()


RECURRENT = [
    lambda **arguments: layers.GRUMML(6, num_heads=2, **arguments),
    lambda **arguments: layers.GRUMML(6, fully_mml=True, forget_lower_bound=[0.9], **arguments),
    lambda **arguments: layers.LRUMML(6, 5, r_min=0.9, r_max=0.999, **arguments),
]


@pytest.mark.parametrize("make", RECURRENT)
@pytest.mark.parametrize("steps", [1, 2, 127, 1024])
def test_the_scan_equals_the_steps(make, steps):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, steps, 4)).astype("float32")
    layer = make(return_sequences=True, return_state=True)
    layer.build(x.shape)
    states = [rng.normal(size=(2, size)).astype("float32") for size in keras.tree.flatten(layer.cell.state_size)]
    scanned = layer(x, initial_state=states)
    stepped = keras.layers.RNN(layer.cell, return_sequences=True, return_state=True)(x, initial_state=states)
    for s, t in zip(scanned[1:], stepped[1:]):  # the states
        np.testing.assert_allclose(array(s), array(t), rtol=1e-4, atol=1e-4 * np.abs(array(t)).max())
    outputs, expected = array(scanned[0]), array(stepped[0])
    equal = np.abs(outputs - expected) <= 1e-4 * np.abs(expected).max()
    if layer.cell.fully_mml:  # outputs are rounded to 255 steps once more, so a few of them may lie on the other side of an edge
        assert equal.mean() > 0.97 and np.abs(outputs - expected).max() < 0.05 * np.abs(expected).max()
    else:
        assert equal.all()


@pytest.mark.parametrize("make", RECURRENT)
@pytest.mark.parametrize("return_sequences", [True, False])
@pytest.mark.parametrize("go_backwards", [True, False])
@pytest.mark.parametrize("zero_output_for_mask", [True, False])
def test_masks_are_treated_as_keras_does(make, return_sequences, go_backwards, zero_output_for_mask):
    rng = np.random.default_rng(1)
    x, mask = rng.normal(size=(4, 20, 4)).astype("float32"), rng.random((4, 20)) < 0.6
    mask[1], mask[2], mask[3, :7], mask[3, 15:] = True, False, False, False
    arguments = dict(return_sequences=return_sequences, return_state=True, go_backwards=go_backwards)
    arguments["zero_output_for_mask"] = zero_output_for_mask and return_sequences
    layer = make(**arguments)
    scanned = layer(x, mask=mask)
    # Unrolled, because on jax Keras' loop takes the first state for the output of a masked step; but not where outputs are zeroed,
    # because unrolled, Keras does that with the wrong mask.
    arguments.update(unroll=not arguments["zero_output_for_mask"], go_backwards=False)
    order = slice(None, None, -1 if go_backwards else 1)
    stepped = keras.layers.RNN(layer.cell, **arguments)(x[:, order], mask=mask[:, order])
    for s, t in zip(scanned, stepped):
        difference = np.abs(array(s) - array(t))
        assert (difference < 1e-4).mean() > 0.97 and difference.max() < 0.05


@pytest.mark.parametrize("make", RECURRENT)
def test_stateful_bidirectional_and_unknown_lengths(make):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 10, 4)).astype("float32")
    whole = make(return_sequences=True)
    expected = array(whole(x))
    stateful = make(return_sequences=True, stateful=True)
    stateful.build((2, 5, 4))
    stateful.set_weights(whole.get_weights())
    halves = [array(stateful(x[:, :5])), array(stateful(x[:, 5:]))]
    close(np.concatenate(halves, axis=1), expected)
    stateful.reset_state()
    close(array(stateful(x[:, :5])), expected[:, :5])

    both = keras.layers.Bidirectional(make(return_sequences=True))
    y = array(both(x))
    assert y.shape == (2, 10, 12)
    reverse = make(return_sequences=True)
    reverse.build(x.shape)
    reverse.set_weights(both.backward_layer.get_weights())
    close(y[:, :, 6:], array(reverse(x[:, ::-1]))[:, ::-1])

    model = keras.Sequential([keras.Input((None, 4)), make()])
    model.compile(loss="mse")
    model.layers[0].set_weights(whole.get_weights())
    for length in (10, 4):
        close(model.predict(x[:, :length], verbose=0), expected[:, length - 1])


def close(a, b):
    difference = np.abs(a - b)
    assert (difference < 1e-4).mean() > 0.9 and difference.max() < 0.1


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only graphs of tensorflow have lengths that are not known")
def test_a_graph_with_an_unknown_length():
    import tensorflow as tf

    layer = layers.GRUMML(6)
    x = np.random.default_rng(0).normal(size=(2, 9, 4)).astype("float32")
    expected = array(layer(x))
    graph = tf.function(lambda x: layer(x), input_signature=[tf.TensorSpec((None, None, 4))])
    close(array(graph(x)), expected)


def test_masks_propagate_from_tokens_through_blocks():
    tokens = np.array([[3, 4, 5, 0, 0], [1, 2, 3, 4, 5]])
    changed = tokens.copy()
    embedding = layers.TokenEmbedding(8, 10, 8, mask_zero=True)
    for mixer in ("gru", "softmax"):
        block = TransformerBlockMML(8, 16, 2, mixer=mixer, causal=False)
        vectors = embedding(tokens)
        y = block(vectors)
        np.testing.assert_array_equal(ops.convert_to_numpy(y._keras_mask), tokens != 0)
        noisy = ops.convert_to_numpy(vectors).copy()
        noisy[0, 3:] += 10  # what is masked must not be seen
        z = block(ops.convert_to_tensor(noisy), mask=ops.convert_to_tensor(tokens != 0))
        close(array(y)[0, :3], array(z)[0, :3])
        unmasked = block(ops.convert_to_tensor(noisy))
        assert np.abs(array(unmasked)[0, :3] - array(y)[0, :3]).max() > 0.05
    assert np.array_equal(tokens, changed)


@pytest.mark.parametrize("mixer", ["gru", "softmax"])
@pytest.mark.parametrize("packed", [False, True])
def test_generation_step_by_step_equals_the_whole(mixer, packed):
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(2, 12, 16)).astype("float32")
    block = TransformerBlockMML(16, 32, 4, mixer=mixer, num_key_value_heads=2 if mixer == "softmax" else None)
    whole = array(block(x))
    if packed:
        block = pack(block)
        whole = array(block(x))
    cache, pieces = block.get_initial_cache(2), []
    for piece in np.split(x, [4, 5, 6, 10], axis=1):
        y, cache = block(piece, cache=cache)
        pieces.append(array(y))
    close(np.concatenate(pieces, axis=1), whole)


@pytest.mark.parametrize("options", [dict(sliding_window=3), dict(use_gate=True), dict(num_key_value_heads=1, rotary=True)], ids=str)
def test_softmax_attention_with_a_cache_does_all_that_it_does_without(options):
    x = np.random.default_rng(0).normal(size=(2, 9, 8)).astype("float32")
    visible = np.ones((2, 9), bool)
    visible[0, :3] = visible[1, 4] = False  # padding on the left, and a gap
    layer = MultiHeadAttentionMML(2, 4, **options)
    for mask in (None, visible):
        whole = array(layer(x, x, value_mask=mask, use_causal_mask=True))
        cache, pieces = layer.get_initial_cache(2), []
        for start, stop in [(0, 4), (4, 5), (5, 9)]:
            piece = x[:, start:stop]
            y, cache = layer(piece, piece, value_mask=None if mask is None else mask[:, start:stop], cache=cache)
            pieces.append(array(y))
        rows = np.ones((2, 9), bool) if mask is None else np.cumsum(mask, axis=1) > 0  # those that see something
        close(np.concatenate(pieces, axis=1)[rows], whole[rows])
    with pytest.raises(ValueError, match="takes no `attention_mask`"):
        layer(x, x, attention_mask=np.ones((2, 9, 9), bool), cache=layer.get_initial_cache(2))


@pytest.mark.parametrize("mixer", ["gru", "softmax"])
def test_padding_on_the_left_stays_unseen_in_the_cache(mixer):
    x = np.random.default_rng(0).normal(size=(1, 6, 16)).astype("float32")
    mask = np.array([[False, False, True, True, True, True]])
    block = TransformerBlockMML(16, 32, 4, mixer=mixer)
    expected = array(block(x, mask=mask))[:, 2:]
    noisy = x.copy()
    noisy[:, :2] += 10
    for inputs in (x, noisy):
        first, cache = block(inputs[:, :4], mask=mask[:, :4], cache=block.get_initial_cache(1))
        last, _ = block(inputs[:, 4:], cache=cache)
        close(np.concatenate([array(first)[:, 2:], array(last)], axis=1), expected)


@pytest.mark.parametrize("mixer", ["gru", "softmax"])
def test_a_functional_model_of_a_block_and_its_cache(mixer):
    block = TransformerBlockMML(8, 16, 2, mixer=mixer)
    x = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(2, 3, 8)).astype("float32"))
    cache, inputs = block.get_initial_cache(2), keras.Input((3, 8))
    states = keras.tree.map_structure(
        lambda v: keras.Input([size or None for size in v.shape[1:]], dtype=keras.backend.standardize_dtype(v.dtype)), cache
    )
    model = keras.Model([inputs, states], block(inputs, cache=states))
    y, after = model([x, cache])
    close(array(y), array(block(x)))
    again, _ = model([x, after])
    assert tuple(again.shape) == (2, 3, 8) and np.abs(array(again) - array(y)).max() > 1e-3


@each([c for c in CASES + ATTENTION if c.weights])
def test_frozen_layers_stay_frozen(case):
    inputs = case.input()
    layer = case.make(trainable=False)
    model = keras.Model(inputs, case.apply(layer, inputs))
    assert not model.trainable_weights
    layer.trainable = True
    assert len(model.trainable_weights) == case.weights
    layer.trainable = False
    clone = keras.models.clone_model(model)
    assert not clone.trainable_weights and not clone.layers[-1].trainable


def test_token_numbers_are_not_rounded():
    tokens = np.arange(0, 4000, 7)[None]
    for dtype in ("mixed_bfloat16", "mixed_float16"):
        inputs = keras.Input((None,))  # float32, as Keras' inputs are
        layer = layers.TokenEmbedding(5000, 4000, 8, dtype=dtype)
        model = keras.Model(inputs, layer(inputs))
        expected = array(ops.cast(layer.tokens.embeddings, dtype.removeprefix("mixed_")))[tokens]
        np.testing.assert_array_equal(array(model(tokens.astype("float32"))), expected)


def test_the_first_place_may_be_any_integer():
    layer = layers.TokenEmbedding(9, 9, 3, with_positions=True)
    tokens = np.array([[1, 2]])
    expected = array(layer(tokens, start=4))
    for start in (np.int64(4), np.int32(4), ops.convert_to_tensor(np.int64(4))):
        np.testing.assert_array_equal(array(layer(tokens, start=start)), expected)


def test_integers_as_inputs():
    x = np.random.default_rng(0).integers(0, 9, (2, 4, 8))
    block = TransformerBlockMML(8, 16, 2)
    close(array(block(x)), array(block(x.astype("float32"))))
    patches = layers.Patches(2)(x.reshape(2, 8, 4, 1).astype("uint8"))
    assert keras.backend.standardize_dtype(patches.dtype) == "float32"


@pytest.mark.parametrize("bound", [np.linspace(0.1, 0.9, 2), (0.1, 0.9), np.float32(0.5), [0, 0.5]], ids=str)
def test_bounds_of_any_kind_are_saved(bound, tmp_path):
    model = keras.Sequential([keras.Input((6, 8))])
    model.add(layers.GRUMML(8, num_heads=2, forget_lower_bound=bound, return_sequences=True))
    model.add(layers.AttentionMML(2, 8, forget_lower_bound=bound))
    for mixer in ("gru", "softmax"):
        model.add(TransformerBlockMML(8, 16, 2, forget_lower_bound=bound, mixer=mixer))
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    x = np.random.default_rng(0).normal(size=(2, 6, 8)).astype("float32")
    np.testing.assert_array_equal(array(loaded(x)), array(model(x)))
    assert json.loads(json.dumps(loaded.get_config())) == json.loads(json.dumps(model.get_config()))


CONVOLUTIONS = [c for c in CASES if "Conv" in c.cls.__name__]


@each(CONVOLUTIONS)
def test_convolutions_of_no_samples_and_of_unknown_lengths(case):
    x = case.data(rows=3)
    model = keras.Sequential([keras.Input((*[None] * (x.ndim - 2), x.shape[-1])), case.make()])
    longer = np.concatenate([x, x], axis=1)
    for m in (model, pack(model)):
        if BACKEND != "tensorflow":  # where Keras' own convolutions fail without samples, too
            assert tuple(m(x[:0]).shape) == (0, *case.output_shape[1:])
        for inputs in (x, longer):  # so that tensorflow makes a graph for any length
            np.testing.assert_allclose(m.predict(inputs, verbose=0), array(m(inputs)), rtol=1e-4, atol=1e-4)


@each([Case(DenseMML, dict(units=5), (2, 8), (2, 5), 2), *CONVOLUTIONS])
def test_packed_layers_have_no_gradient(case):
    model = keras.Sequential([case.input(), case.make()])
    packed, x = pack(model), ops.convert_to_tensor(case.data())
    if BACKEND == "torch":
        x.requires_grad_()
        with pytest.raises(RuntimeError, match="no gradient"):
            packed(x).sum().backward()
    elif BACKEND == "jax":
        import jax

        with pytest.raises(RuntimeError, match="no gradient"):
            jax.grad(lambda x: packed(x).sum())(x)
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(packed(x))
        with pytest.raises(RuntimeError, match="no gradient"):
            tape.gradient(y, x)


def test_arguments_have_the_places_of_their_namesakes():
    for ours, theirs in [(layers.Conv1DMML, keras.layers.Conv1D), (layers.Conv2DMML, keras.layers.Conv2D),
                         (layers.DepthwiseConv2DMML, keras.layers.DepthwiseConv2D), (DenseMML, keras.layers.Dense),
                         (MultiHeadAttentionMML, keras.layers.MultiHeadAttention)]:  # fmt: skip
        places = [[n for n, p in inspect.signature(c.__init__).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD] for c in (ours, theirs)]
        shared = [name for name in places[0] if name in places[1]]
        assert len(shared) > 2 and places[0][: len(shared)] == places[1][: len(shared)] == shared


def test_layers_inside_do_not_use_up_names():
    keras.backend.clear_session()
    layers.Conv2DMML(2, 3), TransformerBlockMML(8, 16, 2)
    assert keras.layers.Conv2D(2, 3).name == "conv2d" and DenseMML(2).name == "dense_mml"


def test_twelve_blocks_train():
    keras.utils.set_random_seed(0)
    for mixer in ("gru", "softmax"):
        model = keras.Sequential([keras.Input((8, 16))])
        for _ in range(12):
            model.add(TransformerBlockMML(16, 32, 4, mixer=mixer, rate=0.0))
        model.add(keras.layers.Dense(1))
        model.compile(keras.optimizers.Adam(0.003), "mse")
        x = np.random.default_rng(0).normal(size=(16, 8, 16)).astype("float32")
        y = np.cumsum(x[:, :, :1], axis=1)  # which takes memory
        losses = [float(model.train_on_batch(x, y)) for _ in range(20)]
        assert losses[-1] < 0.6 * losses[0], (mixer, losses)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: layers.SwiGLUMML(0), "`units`, expected a positive integer. Received: units=0"),
        (lambda: layers.GLUMML(4, hidden_ratio=-1), "Received: hidden_ratio=-1"),
        (lambda: layers.GLUMML(4, intermediate_size=2.5), "Received: intermediate_size=2.5"),
        (lambda: layers.GLUMML(4, activation="siluu"), "siluu"),
        (lambda: layers.GRUMML(-3), "Received: units=-3"),
        (lambda: layers.GRUMML(6, num_heads=4), "`units` must be divisible by `num_heads`. Received: units=6, num_heads=4"),
        (lambda: layers.GRUMML(6, num_heads=0), "Received: num_heads=0"),
        (lambda: layers.GRUMML(6, forget_lower_bound=-0.1), "Received: forget_lower_bound=-0.1"),
        (lambda: layers.GRUMML(6, scale="row"), "Received: scale='row'"),
        (lambda: layers.GRUMML(6)(keras.Input((3, None))), "last dimension of the inputs"),
        (lambda: layers.LRUMML(4, -1), "Received: state_dim=-1"),
        (lambda: layers.LRUMML(4, 4, r_min=0.9, r_max=0.8), "r_min <= r_max <= 1. Received: r_min=0.9, r_max=0.8"),
        (lambda: layers.LRUMML(4, 4, r_min="a"), "Received: r_min='a', r_max=1"),
        (lambda: layers.GRUMML(8, "tanh"), "Received: fully_mml='tanh'"),
        (lambda: layers.GRUMML(4, num_heads=2, forget_lower_bound=[[0.1], 0.2]), "Received: forget_lower_bound=[[0.1], 0.2]"),
        (lambda: layers.LRUMML(4, 4, r_max=1.5), "Received: r_min=0, r_max=1.5"),
        (lambda: layers.LRUMML(4, 4, max_phase=-1), "Received: max_phase=-1"),
        (lambda: layers.AttentionMML(3, 8), "Received: out_dim=8, num_heads=3"),
        (lambda: layers.AttentionMML(1, 0), "Received: out_dim=0"),
        (lambda: layers.MultiHeadAttentionMML(0, 8), "Received: num_heads=0"),
        (lambda: layers.MultiHeadAttentionMML(4, 3, rotary=True), "Received: key_dim=3"),
        (lambda: layers.MultiHeadAttentionMML(4, 4, num_key_value_heads=3), "Received: num_heads=4, num_key_value_heads=3"),
        (lambda: layers.MultiHeadAttentionMML(4, 4, max_wavelength=0), "Received: max_wavelength=0"),
        (lambda: layers.MultiHeadAttentionMML(2, 4, rotary=True)(*[np.ones((1, 3, 5, 8))] * 2), "`rotary=True` needs queries of shape"),
        (lambda: pack(layers.GLUMML(3)), "Only built layers can be packed"),
        (lambda: layers.MultiHeadAttentionMML(4, 4, output_shape=(2, 3)), "Received: output_shape=(2, 3)"),
        (lambda: TransformerBlockMML(8, 16, 3), "`embedding_dim` must be divisible by `num_heads`"),
        (lambda: TransformerBlockMML(8, 0, 2), "Received: ffn_dim=0"),
        (lambda: TransformerBlockMML(8, 16, 2, mixer="mamba"), "`mixer`, expected one of: \"gru\", \"softmax\". Received: mixer='mamba'"),
        (lambda: TransformerBlockMML(8, 16, 2, rate=1), "Received: rate=1"),
        (lambda: TransformerBlockMML(8, 16, 2)(np.ones((1, 3, 9))), "embedding_dim=8"),
        (lambda: layers.TokenEmbedding(0, 5, 5), "Received: max_len=0"),
        (lambda: layers.TokenEmbedding(5, 5, 5)(np.ones((1, 6), "int32")), "at most max_len=5 tokens. Received: 6 tokens"),
        (lambda: layers.TokenEmbedding(5, 5, 5, with_positions=True)(keras.Input((6,), dtype="int32")), "Received: 6 tokens"),
        (lambda: layers.PatchEmbedding(0, 5), "Received: num_patches=0"),
        (lambda: layers.PatchEmbedding(4, 5)(np.ones((1, 3, 9))), "made for 4 patches"),
        (lambda: layers.Patches(3)(np.ones((1, 8, 9, 1))), "Received: patch_size=3 and images of shape (8, 9, 1)"),
        (lambda: [p(np.ones((1, n, n, 1))) for p in [layers.Patches(4)] for n in (8, 9)], "images of shape (9, 9, 1)"),
        (lambda: layers.Patches(-1), "Received: patch_size=-1"),
        (lambda: layers.Conv2DMML(-4, 3), "filters=-4"),
        (lambda: layers.Conv1DMML(4, 0), "kernel_size"),
        (lambda: layers.Conv2DMML(4, 3, norm="layer"), "Received: norm='layer'"),
        (lambda: layers.Conv2DMML(4, 3, norm=None, norm_gain=True), "norm_gain"),
        (lambda: layers.Conv2DMML(4, 3)(keras.Input((8, 8, None))), "needs the number of channels"),
        (lambda: layers.Conv2DMML(4, 3, groups=2)(np.ones((1, 8, 8, 3))), "channels=3, groups=2"),
        (lambda: layers.DepthwiseConv2DMML(3, depth_multiplier=0), "depth_multiplier=0"),
    ],
)  # fmt: skip
def test_bad_arguments_say_what_was_received(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_recurrent_layers_are_linear_recurrences():
    assert issubclass(layers.GRUMML, ScanRNN) and issubclass(layers.LRUMML, ScanRNN) and issubclass(ScanRNN, keras.layers.RNN)
