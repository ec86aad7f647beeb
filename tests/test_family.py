"""What must hold for every layer: Keras' conventions, training, saving, resuming, packing, and use in models of every kind."""

import inspect
import json

import keras
import numpy as np
import pytest
from cases import (
    ATTENTION,
    BACKEND,
    CASES,
    CELLS,
    EVERY,
    FIRST,
    FULL,
    TERNARY,
    VARIANTS,
    Case,
    array,
    data_side_by_side,
    each,
    every_case,  # noqa: F401
    packable,
    rows,
    shaken,
    side_by_side,
    ternary_cases,
)  # fmt: skip
from keras import ops
from keras.src import testing

from keras_mml import layers, pack, runtime
from keras_mml.layers import *  # noqa: F403
from keras_mml.layers import DenseMML, MultiHeadAttentionMML, TransformerBlockMML
from keras_mml.layers.recurrent import ScanRNN


@pytest.mark.any_backend
def test_no_layer_is_forgotten():
    exported = {getattr(layers, name) for name in layers.__all__}
    exported = {cls for cls in exported if isinstance(cls, type) and issubclass(cls, keras.layers.Layer)}
    assert exported == {case.cls for case in EVERY} | {cls for cls, *_ in CELLS}


def conforms(case, packed=False):
    "Keras' own test of a layer. On jax and tensorflow, its parts that compile a layer anew run once a class; every row is trained below."
    two = case.cls is MultiHeadAttentionMML  # Keras trains layers with one input
    first = case in FIRST or BACKEND == "torch" or FULL
    test = testing.TestCase()
    test.setUp()
    try:
        test.run_layer_test(
            case.cls,
            init_kwargs={**case.arguments, "packed": True} if packed else case.arguments,
            input_shape={"query_shape": case.input_shape, "value_shape": case.input_shape} if two else case.input_shape,
            input_dtype=None if two else case.dtype,
            expected_output_shape=case.output_shape,
            expected_num_trainable_weights=0 if packed and case.cls is DenseMML else None if packed else case.weights,
            expected_num_non_trainable_weights=None if packed else 0,
            expected_num_losses=0 if packed else case.losses,
            supports_masking=case.masks,
            run_training_check=first and not packed and not two and case.weights > 0 and not case.tokens,
            run_mixed_precision_check=first and not case.tokens,
        )
    finally:
        test.doCleanups()


@each(EVERY + VARIANTS)
def test_keras_conformance(case):
    conforms(case)


@each(TERNARY + [case for case in VARIANTS if case.ternary])
def test_keras_conformance_of_packed_layers(case):
    conforms(case, packed=True)


@pytest.mark.parametrize("cls, arguments, states", CELLS)
def test_cells(cls, arguments, states):
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype("float32")
    cell = cls(**arguments)
    rnn = keras.layers.RNN(cell, return_state=True)
    output, *end = rnn(x)
    assert [tuple(s.shape) for s in end] == states and tuple(output.shape) == (2, cell.units)
    symbolic = rnn(keras.Input((5, 8)))
    assert [tuple(s.shape) for s in symbolic] == [(None, cell.units), *[(None, s[1]) for s in states]]
    config = json.loads(json.dumps(cell.get_config()))
    assert cls.from_config(config).get_config() == cell.get_config()
    stacked = keras.layers.RNN([cls.from_config(config), layers.GRUCellMML(3)])
    assert tuple(stacked(x).shape) == (2, 3)


@pytest.mark.any_backend
@each(EVERY + VARIANTS)
def test_the_configuration_names_every_argument_and_survives_json(case):
    layer = case.make()
    config = json.loads(json.dumps(layer.get_config()))
    parameters = inspect.signature(case.cls.__init__).parameters
    parameters = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    assert parameters - {"self"} <= set(config)
    assert case.cls.from_config(config).get_config() == layer.get_config()


def train(model, case, seed, epochs=1):
    x, y = case.data(rows=32, seed=seed), np.random.default_rng(seed).normal(size=(32, 2)).astype("float32")
    return model.fit(x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0).history["loss"]


@each(EVERY + VARIANTS, short=FIRST[::3])
def test_every_layer_trains_compiled_and_a_saved_model_goes_on_bit_for_bit(case, tmp_path):
    "One model for all of it: on jax and tensorflow, compilation takes most of the time. Torch would take minutes of a C++ compiler."
    keras.utils.set_random_seed(7)
    model, x = shaken(case.model(jit_compile="auto" if BACKEND == "torch" else True), 0.05), case.data(rows=16)
    np.testing.assert_allclose(model.predict(x, verbose=0), array(model(x)), rtol=0.05, atol=0.05)
    start = [array(v) for v in model.trainable_variables]
    losses = train(model, case, seed=3, epochs=5)
    assert losses[-1] < losses[0]
    for variable, old in zip(model.trainable_variables, start, strict=True):  # Adam moves whatever has a gradient
        if variable.path.endswith("key/bias"):  # adds the same to all scores of a query, so softmax does not see it
            continue
        assert np.isfinite(array(variable)).all() and not np.array_equal(array(variable), old), variable.path
    model.save(tmp_path / "m.keras")
    resumed = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(array(resumed(x)), array(model(x)))
    before = [array(v) for v in resumed.trainable_variables]
    train(model, case, seed=4), train(resumed, case, seed=4)
    states = [[*m.variables, *m.optimizer.variables] for m in (model, resumed)]
    for uninterrupted, continued in zip(*states, strict=True):
        np.testing.assert_array_equal(array(continued), array(uninterrupted))
    assert any((a != array(b)).any() for a, b in zip(before, resumed.trainable_variables, strict=True))  # and it did train


@ternary_cases
def test_packed_models_predict_the_same_and_are_saved(case, tmp_path):
    keras.utils.set_random_seed(0)
    model, x = shaken(case.model(), 0.01), case.data(rows=16)
    expected = array(model(x))
    packed = pack(model)
    ternary = packable(packed)
    assert ternary and all(layer.packed for layer in ternary) and not any(w.name == "kernel" for layer in ternary for w in layer.weights)
    outputs = array(packed(x))
    scale = np.abs(expected).max()
    # float rounding, but for inputs on the edge between two integers, whose step is carried through the layers behind
    assert np.median(np.abs(outputs - expected)) < 1e-3 * scale and np.abs(outputs - expected).max() < 0.1 * scale

    packed.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert all(layer.packed for layer in packable(loaded))
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


@pytest.mark.parametrize("dtype", [pytest.param("mixed_bfloat16", marks=pytest.mark.slow_to_compile), "mixed_float16"])
@rows(EVERY)
def test_mixed_precision_keeps_float32_weights_and_trains(cases, dtype):
    "All layers side by side, each with a loss of its own, which is finite where its outputs are."
    missing = BACKEND == "jax" and dtype == "mixed_float16"  # jax has no attention in float16 on a CPU
    cases = [case for case in cases if not missing or case.cls is not MultiHeadAttentionMML and case.arguments.get("mixer") != "softmax"]
    model, x = side_by_side(cases, dtype=dtype), data_side_by_side(cases, 16)
    made = [layer for layer in model.layers if layer.dtype_policy.name == dtype]
    assert {type(layer) for layer in made} == {case.cls for case in cases} and len(made) == len(cases)
    for layer in made:
        assert all(keras.backend.standardize_dtype(w.dtype) == "float32" for w in layer.weights), layer
        assert keras.backend.standardize_dtype(layer.output.dtype) == layer.compute_dtype, layer
    model.compile(keras.optimizers.Adam(0.01), "mse")
    for _ in range(2):
        losses = model.train_on_batch(x, {name: np.ones((16, 2), "float32") for name in x}, return_dict=True)
        assert not [case.name for name, case in zip(x, cases, strict=True) if not np.isfinite(losses[f"{name}_loss"])]


RECURRENT = [
    lambda **arguments: layers.GRUMML(6, num_heads=2, **arguments),
    lambda **arguments: layers.GRUMML(6, fully_mml=True, forget_lower_bound=[0.9], **arguments),
    lambda **arguments: layers.LRUMML(6, 5, r_min=0.9, r_max=0.999, **arguments),
]


@pytest.mark.slow_to_compile
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
    for s, t in zip(scanned[1:], stepped[1:], strict=True):  # the states
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
    for s, t in zip(scanned, stepped, strict=True):
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


@pytest.mark.slow_to_compile
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
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow_to_compile), True])
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


OPTIONS = [dict(sliding_window=3), dict(use_gate=True), dict(num_key_value_heads=1, rotary=True)]
UNKNOWN = {"sliding_window"} - set(inspect.signature(keras.layers.MultiHeadAttention.__init__).parameters)  # before Keras 3.15


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("options", [o for o in OPTIONS if not UNKNOWN & set(o)], ids=str)
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


@pytest.mark.slow_to_compile
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


@pytest.mark.slow_to_compile
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


@pytest.mark.slow_to_compile
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


@pytest.mark.any_backend
def test_arguments_have_the_places_of_their_namesakes():
    for ours, theirs, _ in OF_NAMESAKES:
        parameters = [inspect.signature(c.__init__).parameters.items() for c in (ours, theirs)]
        places = [[n for n, p in of_one if p.kind is p.POSITIONAL_OR_KEYWORD] for of_one in parameters]
        shared = [name for name in places[0] if name in places[1]]
        assert len(shared) > 2 and places[0][: len(shared)] == places[1][: len(shared)] == shared


def test_layers_inside_do_not_use_up_names():
    keras.backend.clear_session()
    layers.Conv2DMML(2, 3), TransformerBlockMML(8, 16, 2)
    assert keras.layers.Conv2D(2, 3).name == "conv2d" and DenseMML(2).name == "dense_mml"


@pytest.mark.slow_to_compile
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


@pytest.mark.any_backend
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
        (lambda: layers.Patches(9)(np.ones((1, 8, 9, 1))), "Received: patch_size=9 and images of shape (8, 9, 1)"),
        (lambda: [p(np.ones((1, n, n, 1))) for p in [layers.Patches(4)] for n in (8, 3)], "images of shape (3, 3, 1)"),
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


@pytest.mark.any_backend
def test_recurrent_layers_are_linear_recurrences():
    assert issubclass(layers.GRUMML, ScanRNN) and issubclass(layers.LRUMML, ScanRNN) and issubclass(ScanRNN, keras.layers.RNN)


class DtypesSeen(keras.layers.Layer):
    "Passes on what it is called with, symbolically and with numbers, and remembers the dtypes."

    def __init__(self):
        super().__init__(autocast=False)
        self.seen = set()

    def call(self, x):
        self.seen.add(keras.backend.standardize_dtype(x.dtype))
        return x


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@every_case
def test_pure_dtypes_are_kept_and_train(case, dtype):
    if BACKEND == "jax" and dtype == "float16" and (case.cls is MultiHeadAttentionMML or case.arguments.get("mixer") == "softmax"):
        pytest.skip("jax has no attention in float16 on a CPU")
    expected = keras.layers.Dense(2, dtype=dtype)(np.ones((2, 3), "float32")).dtype  # float64 is float32 on jax unless it is told otherwise
    inputs, layer, seen = case.input(), case.make(dtype=dtype), DtypesSeen()
    y = case.apply(layer, inputs)
    assert y.dtype == dtype and all(w.dtype == dtype for w in layer.trainable_weights)
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(seen(y))))
    model.compile(keras.optimizers.SGD(0.01), "mse")
    x, seen.seen = case.data(rows=4), set()
    if BACKEND == "tensorflow" and case.arguments.get("groups", 1) > 1:  # it has no gradient of those on a CPU without XLA
        assert np.isfinite(array(model(x))).all()
    else:
        assert np.isfinite([model.train_on_batch(x, np.ones((4, 2), "float32")) for _ in range(2)]).all()
    assert seen.seen == {keras.backend.standardize_dtype(expected)}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_radii_near_one_start_finite_in_half_precision(dtype):
    cell = layers.LRUCellMML(2, 2000, r_min=0.999, r_max=1, dtype=dtype)
    cell.build((None, 8))
    for weight in (cell.nu_log, cell.theta_log, cell.gamma_log):
        assert weight.dtype == dtype and np.isfinite(array(weight)).all()


NO_KERNEL = dict(recurrent_initializer="orthogonal", recurrent_regularizer="l2", recurrent_constraint="non_neg", recurrent_dropout=0.1,
                 reset_after=False, use_cudnn="auto")  # fmt: skip
OF_GRU = dict(activation="relu", recurrent_activation="hard_sigmoid", use_bias=False,
              kernel_initializer="he_normal", bias_initializer="ones",
              kernel_regularizer="l2", bias_regularizer="l1", activity_regularizer="l2", kernel_constraint="non_neg",
              bias_constraint="unit_norm", dropout=0.25, seed=3, return_sequences=True, return_state=True, go_backwards=True, stateful=True,
              unroll=True)  # fmt: skip


def test_gru_takes_every_argument_of_its_namesake():
    "Each is in the configuration, or ignored with a warning of its own that names it."
    theirs = set(inspect.signature(keras.layers.GRU.__init__).parameters) - {"self", "kwargs", "units"}
    assert theirs == set(OF_GRU) | set(NO_KERNEL)
    with pytest.warns(UserWarning) as warned:
        layer = layers.GRUMML(4, **OF_GRU, **NO_KERNEL)
    assert sorted(str(w.message).split("`")[1] for w in warned) == sorted(NO_KERNEL)
    config = json.loads(json.dumps(layer.get_config()))
    expected = keras.layers.GRU(4, **OF_GRU).get_config()
    for name in OF_GRU:
        assert config[name.replace("kernel_", "weights_")] == expected[name], name
    assert layers.GRUMML.from_config(config).get_config() == layer.get_config()
    assert type(layer.weights_initializer) is type(layer.cell.input_map.kernel_initializer) is keras.initializers.HeNormal


@pytest.mark.filterwarnings("error")
def test_arguments_that_ask_for_nothing_are_not_warned_of():
    layers.GRUMML(4, recurrent_regularizer=None, recurrent_dropout=0.0)
    with pytest.raises(ValueError, match="dropout=1.5"):
        layers.GRUMML(4, dropout=1.5)


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("make", RECURRENT)
def test_dropout_drops_the_same_features_at_all_steps(make, unroll):
    layer = make(dropout=0.5, seed=1, unroll=unroll, return_sequences=True, norm=None)
    x = np.ones((64, 3, 4), "float32")
    np.testing.assert_array_equal(array(layer(x)), array(layer(x)))
    seen, recurrence = [], layer.cell.recurrence
    layer.cell.recurrence = lambda inputs: seen.append(array(inputs)) or recurrence(inputs)
    y = array(layer(x, training=True))
    assert np.abs(y - array(layer(x))).max() > 1e-3
    seen = np.stack(seen[:3], axis=1) if unroll else seen[0]
    assert set(np.unique(seen)) == {0.0, 2.0} and abs((seen == 0).mean() - 0.5) < 0.15
    np.testing.assert_array_equal(seen, np.repeat(seen[:, :1], 3, axis=1))
    del layer.cell.recurrence
    model = keras.Sequential([keras.Input((3, 4)), make(dropout=0.5)])
    model.compile("sgd", "mse")
    assert np.isfinite(model.train_on_batch(x, np.zeros((64, 6), "float32")))


@pytest.mark.parametrize("make", RECURRENT)
@pytest.mark.parametrize("unroll", [False, True])
def test_a_list_of_one_mask_is_that_mask(make, unroll):
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")
    mask = ops.convert_to_tensor(np.array([[True, True, False, True, False], [False, True, True, True, True]]))
    layer = make(unroll=unroll)
    np.testing.assert_array_equal(array(layer(x, mask=[mask])), array(layer(x, mask=mask)))
    assert np.abs(array(layer(x, mask=mask)) - array(layer(x))).max() > 1e-3
    np.testing.assert_array_equal(array(layer(x, mask=[None])), array(layer(x)))


def test_recurrent_layers_show_what_their_cells_were_made_with():
    gru, lru = layers.GRUMML(6, num_heads=2, activation="relu", forget_lower_bound=0.5), layers.LRUMML(5, 7, r_max=0.9)
    assert (gru.units, gru.num_heads, gru.activation, gru.forget_lower_bound) == (6, 2, keras.activations.relu, 0.5)
    assert (lru.units, lru.state_dim, lru.r_max, lru.use_bias) == (5, 7, 0.9, False)


@pytest.mark.parametrize("cls", [layers.GLUMML, layers.SwiGLUMML])
def test_gated_units_say_how_wide_they_are(cls):
    layer = cls(3, hidden_ratio=2)
    config = layer.get_config()
    assert layer.intermediate_size is None
    layer.build((None, 200))
    assert layer.intermediate_size == 512 == layer.down.kernel.shape[0]
    assert layer.get_config() == config and cls.from_config(config).get_config() == config
    fixed = cls(3, intermediate_size=7)
    fixed.build((None, 200))
    assert fixed.intermediate_size == fixed.get_config()["intermediate_size"] == 7


@pytest.mark.parametrize("size", [(9, 8), (8, 11), (11, 9)])
def test_patches_are_those_of_keras(size):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype("float32")
    expected = array(ops.image.extract_patches(x, 4, padding="valid", data_format="channels_last")).reshape(2, -1, 48)
    layer = layers.Patches(4)
    np.testing.assert_array_equal(array(layer(x)), expected)
    assert layer.compute_output_shape(x.shape) == layer(keras.Input((*size, 3), batch_size=2)).shape == expected.shape


NEEDED = dict(units=4, filters=4, kernel_size=3, num_heads=2, key_dim=4)
OF_NAMESAKES = [  # a GRU's have a test of their own
    (cls, theirs, {name: NEEDED[name] for name in inspect.signature(theirs.__init__).parameters if name in NEEDED})
    for cls in dict.fromkeys(case.cls for case in EVERY) if not issubclass(cls, keras.layers.RNN)
    for theirs in getattr(cls, "keras_twins", ())[:1]
]  # fmt: skip
OTHER_VALUES = dict(activation="relu", use_bias=False, padding="same", strides=2, groups=2, depth_multiplier=2,
                    data_format="channels_first", dilation_rate=1, value_dim=6, dropout=0.1, output_shape=5,
                    attention_axes=(1,), flash_attention=False, seed=3, sliding_window=2,
                    use_gate=True, lora_rank=2, lora_alpha=2)  # fmt: skip


@pytest.mark.parametrize("ours, theirs, needed", OF_NAMESAKES)
def test_every_argument_of_a_namesake_is_taken_or_refused_by_name(ours, theirs, needed):
    other = {"initializer": "he_normal", "regularizer": "l2", "constraint": "non_neg"}
    for name in set(inspect.signature(theirs.__init__).parameters) - {"self", "kwargs", *needed}:
        value = other.get(name.split("_")[-1], OTHER_VALUES.get(name))
        arguments = {**needed, name: value}
        if name.startswith("lora") or name == "quantization_config":  # other ways to compress a layer
            with pytest.raises(ValueError, match=f"Unrecognized keyword arguments passed to {ours.__name__}: .*{name}"):
                ours(**arguments)
            continue
        config = ours(**arguments).get_config()
        assert config.get(name) == theirs(**arguments).get_config().get(name), name  # Keras leaves out `flash_attention`
        config = json.loads(json.dumps(config))
        assert json.loads(json.dumps(ours.from_config(config).get_config())) == config


@pytest.mark.slow_to_compile
def test_the_runtime_crops_patches_and_drops_nothing(tmp_path):
    parts = layers.Patches(4), layers.GRUMML(5, dropout=0.5, return_sequences=True), layers.LRUMML(3, 4, dropout=0.5)
    model = pack(keras.Sequential([keras.Input((11, 9, 3)), *parts]))
    model.save(tmp_path / "m.keras")
    x = np.random.default_rng(0).normal(size=(4, 11, 9, 3)).astype("float32")
    close(runtime.load(tmp_path / "m.keras")(x), array(model(x)))
