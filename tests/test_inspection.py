"""What `summary` counts, against numbers computed by hand, and what the plots draw, on every backend."""

import json
import math
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import h5py
import keras
import matplotlib
import numpy as np
import pytest
from cases import TERNARY, rows, side_by_side
from keras import layers, ops

import keras_mml
from keras_mml import pack, summary
from keras_mml.graph.costs import COSTS, ENERGY_PJ, operations
from keras_mml.graph.evaluate import PRIMITIVES
from keras_mml.graph.trace import trace
from keras_mml.inspection import (
    plot_accuracy_against_bits,
    plot_activations,
    plot_costs,
    plot_graph,
    plot_latent_weights,
    plot_trits,
)
from keras_mml.layers import (
    GRUMML,
    LRUMML,
    AttentionMML,
    Conv1DMML,
    Conv2DMML,
    DenseMML,
    DepthwiseConv2DMML,
    GRUCellMML,
    MultiHeadAttentionMML,
    PatchEmbedding,
    Patches,
    RMSNorm,
    TokenEmbedding,
    TransformerBlockMML,
)
from keras_mml.quantizers import StraightThroughQuantizer

pytestmark = pytest.mark.slow_to_compile

matplotlib.use("Agg")


def chain(*parts, shape, **kwargs):
    return keras.Sequential([keras.Input(shape, **kwargs), *parts])


def row(model, layer, **kwargs):
    "The row of a layer, or of what it is the last part of the path of."
    rows = {r["layer"]: r for r in summary(model, **kwargs).rows}
    return rows[layer]


def counts(*parts, shape, name=None, **kwargs):
    "Multiplications and additions of the layer, by kind."
    return row(chain(*parts, shape=shape, **kwargs), name or parts[-1].name)["operations"]


def floats(multiply, add):
    return {k: v for k, v in {"float32 multiply": multiply, "float32 add": add}.items() if v}


def nonzero(layer):
    return int(np.count_nonzero(layer.ternary_state()["trits"]))


# ---- products

def test_dense():
    # 5 outputs of 7 products each, and 5 biases
    assert counts(layers.Dense(5), shape=(7,)) == floats(5 * 7, 5 * 7 + 5)
    assert counts(layers.Dense(5, use_bias=False), shape=(3, 7)) == floats(3 * 5 * 7, 3 * 5 * 7)
    # sigmoid: 1 / (1 + exp(-x)), a division and an addition for each of the 5
    assert counts(layers.Dense(5, activation="sigmoid"), shape=(7,)) == floats(35 + 5, 35 + 5 + 5)


@pytest.mark.parametrize("packed", [False, True])
def test_dense_mml(packed):
    layer = DenseMML(5, norm_gain=True, activation="relu", name="ternary")
    model = chain(layer, shape=(3, 7))
    model = pack(model) if packed else model
    # for each of 3 rows: 7 squares, 7 divisions by the norm, 7 gains, 7 divisions by the step, 5 scales; 7 sums of squares, 5 biases
    expected = {"float32 multiply": 3 * (4 * 7 + 5), "float32 add": 3 * (7 + 5), "int32 add": 3 * nonzero(layer)}
    assert row(model, "ternary")["operations"] == expected
    assert 0 < nonzero(layer) < 35


def test_dense_mml_without_norm_and_bias():
    layer = DenseMML(5, norm=None, use_bias=False, scale="channel")
    assert counts(layer, shape=(7,)) == {"float32 multiply": 7 + 5, "int32 add": nonzero(layer)}


def test_einsum_dense():
    # (6, 8) by (8, 2, 4): 6 * 2 * 4 outputs of 8 products, and as many biases
    layer = layers.EinsumDense("abc,cde->abde", output_shape=(None, 2, 4), bias_axes="de")
    assert counts(layer, shape=(6, 8)) == floats(48 * 8, 48 * 8 + 48)
    # two contracted axes: 6 * 5 outputs of 2 * 4 products
    layer = layers.EinsumDense("abcd,cde->abe", output_shape=(None, 5))
    assert counts(layer, shape=(6, 2, 4)) == floats(30 * 8, 30 * 8)
    layer = layers.EinsumDense("...x,xy->...y", output_shape=5)
    assert counts(layer, shape=(6, 3)) == floats(30 * 3, 30 * 3)


def test_convolutions():
    # 10 x 10 with a window of 3 and stride 2: 4 x 4 places; 8 filters of 3 * 3 * 4 products
    assert counts(layers.Conv2D(8, 3, strides=2), shape=(10, 10, 4)) == floats(16 * 8 * 36, 16 * 8 * 37)
    # two groups: each filter sees half of the channels
    assert counts(layers.Conv2D(8, 3, groups=2, use_bias=False, padding="same"), shape=(10, 10, 4)) == floats(*[800 * 18] * 2)
    assert counts(layers.Conv1D(8, 3, padding="causal", dilation_rate=2), shape=(10, 4)) == floats(80 * 12, 80 * 13)
    assert counts(layers.Conv3D(2, 2), shape=(3, 3, 3, 4)) == floats(16 * 32, 16 * 33)
    # each of the 4 * 2 outputs at 8 x 8 places sees one channel
    assert counts(layers.DepthwiseConv2D(3, depth_multiplier=2), shape=(10, 10, 4)) == floats(64 * 8 * 9, 64 * 8 * 10)
    assert counts(layers.DepthwiseConv1D(3), shape=(10, 4)) == floats(8 * 4 * 3, 8 * 4 * 4)
    # 8 x 8 places: 4 * 2 channels of 9 products, then 6 filters of 8 products, and 6 biases
    separable = layers.SeparableConv2D(6, 3, depth_multiplier=2)
    assert counts(separable, shape=(10, 10, 4)) == floats(64 * (8 * 9 + 6 * 8), 64 * (8 * 9 + 6 * 8 + 6))
    # each of 5 * 5 * 4 inputs meets 3 * 3 * 6 weights; 11 x 11 places have 6 biases
    assert counts(layers.Conv2DTranspose(6, 3, strides=2), shape=(5, 5, 4)) == floats(100 * 54, 100 * 54 + 121 * 6)


def test_ternary_convolutions():
    layer = Conv2DMML(8, 3, strides=2, groups=2)
    # 400 inputs: square, norm, step; 4 * 4 * 8 outputs: the scale of the kernel and that of the sample; that and its inverse are two
    # divisions; each trit that is not 0 adds at 16 places
    expected = {"float32 multiply": 3 * 400 + 2 + 2 * 128, "float32 add": 400 + 128}
    assert counts(layer, shape=(10, 10, 4)) == {**expected, "int32 add": 16 * nonzero(layer)}
    layer = DepthwiseConv2DMML(3, depth_multiplier=2, norm=None)
    expected = {"float32 multiply": 400 + 2 + 2 * 64 * 8, "float32 add": 64 * 8}
    assert counts(layer, shape=(10, 10, 4)) == {**expected, "int32 add": 64 * nonzero(layer)}
    # causal: 10 windows of 3 * 4 inputs, each rounded by itself, with a scale of its own
    layer = Conv1DMML(8, 3, padding="causal", use_bias=False)
    expected = {"float32 multiply": 3 * 120 + 2 * 10 + 2 * 80, "float32 add": 120}
    assert counts(layer, shape=(10, 4)) == {**expected, "int32 add": 10 * nonzero(layer)}


# ---- what is small

def test_normalisations_poolings_and_merges():
    assert counts(layers.BatchNormalization(), shape=(4, 6)) == floats(24, 24)  # x * a + b
    # mean; difference, square, mean of squares; times 1 / deviation; gamma, beta
    assert counts(layers.LayerNormalization(), shape=(4, 6)) == floats(3 * 24, 4 * 24)
    assert counts(layers.LayerNormalization(center=False, scale=False), shape=(4, 6)) == floats(2 * 24, 3 * 24)
    assert counts(layers.RMSNormalization(), shape=(4, 6)) == floats(3 * 24, 24)
    assert counts(RMSNorm(), shape=(4, 6)) == floats(3 * 24, 24)
    assert counts(RMSNorm(has_learnable_weights=False), shape=(4, 6)) == floats(2 * 24, 24)
    assert counts(layers.AveragePooling2D(2), shape=(4, 4, 3)) == floats(12, 4 * 12)
    assert counts(layers.GlobalAveragePooling2D(), shape=(4, 4, 3)) == floats(3, 48)
    assert counts(layers.Rescaling(1 / 255), shape=(4,)) == floats(4, 4)
    assert counts(layers.Softmax(), shape=(4,)) == floats(4, 8)
    assert counts(layers.LeakyReLU(), shape=(4,)) == floats(4, 0)
    quiet = chain(layers.MaxPooling2D(), layers.ReLU(), layers.Flatten(), layers.Dropout(0.5), shape=(4, 4, 3))
    assert summary(quiet).rows == [] and summary(quiet).total["energy_pj"] == 0
    augmented = chain(layers.RandomFlip(), layers.RandomRotation(0.5), layers.RandomContrast(0.5), shape=(4, 4, 3))
    assert summary(augmented).total["complete"] and summary(augmented).total["multiplications"] == 0
    a, b, c = (keras.Input((5,)) for _ in range(3))
    for merge, expected in [(layers.Add(), (0, 10)), (layers.Average(), (5, 10)), (layers.Multiply(), (10, 0))]:
        assert row(keras.Model([a, b, c], merge([a, b, c])), merge.name)["operations"] == floats(*expected)


def test_operations_that_are_not_layers():
    a, b = keras.Input((5,)), keras.Input((5,))
    model = keras.Model([a, b], ops.reshape((a + b) * a, (-1, 5)))
    assert {r["class"]: r["operations"] for r in summary(model).rows} == {"Add": floats(0, 5), "Multiply": floats(5, 0)}
    square = keras.Input((5, 5))
    unknown = summary(keras.Model(square, ops.linalg.inv(square)))
    assert unknown.rows[0]["multiplications"] is None and not unknown.total["complete"]


def test_embeddings():
    model = chain(TokenEmbedding(16, 100, 8, with_positions=True, name="words"), shape=(5,), dtype="int32")
    rows = {r["layer"]: r for r in summary(model).rows}
    assert rows["words"]["operations"] == floats(0, 5 * 8)
    assert rows["words/tokens"]["parameters"] == 800 and rows["words/tokens"]["operations"] == {}
    assert rows["words/tokens"]["bytes_int8"] == 800
    model = chain(Patches(7, name="cut"), PatchEmbedding(16, 8, with_positions=True, name="patches"), shape=(28, 28, 1))
    assert row(model, "patches")["operations"] == floats(0, 16 * 8)
    assert row(model, "patches/patches")["ternary_parameters"] == 49 * 8


# ---- attention

def attention(tokens, keys, heads, key_dim, value_dim):
    scores = heads * tokens * keys
    # scores, softmax (difference, sum, division), values, and the division by sqrt(key_dim)
    multiply = scores * key_dim + scores + scores * value_dim + tokens * heads * key_dim
    return floats(multiply, scores * key_dim + 2 * scores + scores * value_dim)


@pytest.mark.parametrize("dropout", [0.0, 0.1])  # which changes whether Keras calls its softmax as a layer
def test_attention(dropout):
    x, y = keras.Input((6, 16)), keras.Input((9, 16))
    value_dim = 5 if dropout else 8  # Keras' fused attention wants them equal on jax
    model = keras.Model([x, y], layers.MultiHeadAttention(4, 8, value_dim=value_dim, dropout=dropout, name="mha")(x, y))
    rows = {r["layer"]: r for r in summary(model).rows}
    assert rows.keys() == {"mha", *(f"mha/{part}" for part in ("query", "key", "value", "attention_output"))}
    assert rows["mha"]["operations"] == attention(6, 9, 4, 8, value_dim)
    assert rows["mha/query"]["operations"] == floats(6 * 32 * 16, 6 * 32 * 17)
    assert rows["mha/value"]["operations"] == floats(36 * value_dim * 16, 36 * value_dim * 17)
    assert rows["mha/attention_output"]["operations"] == floats(96 * 4 * value_dim, 96 * (4 * value_dim + 1))


def test_grouped_and_ternary_attention():
    x = keras.Input((6, 16))
    model = keras.Model(x, layers.GroupQueryAttention(8, 4, 2, name="gqa")(x, x))
    assert row(model, "gqa")["operations"] == attention(6, 6, 4, 8, 8)
    layer = MultiHeadAttentionMML(4, 8, num_key_value_heads=2, rotary=True, name="mha")
    model = keras.Model(x, layer(x, x, use_causal_mask=True))
    expected = attention(6, 6, 4, 8, 8)
    turned = 6 * (4 + 2) * 8  # values, each two products and a sum
    assert row(model, "mha")["operations"] == floats(expected["float32 multiply"] + 2 * turned, expected["float32 add"] + turned)
    assert row(model, "mha/key")["ternary_parameters"] == 16 * 16


def test_attention_without_projections():
    q, v = keras.Input((6, 8)), keras.Input((7, 5))
    k = keras.Input((7, 8))
    scores, dim = 6 * 7, 8
    behind = scores + scores * 5, 2 * scores + scores * 5  # softmax, and the sum of values
    for layer, (multiply, add) in [
        (layers.Attention(), (scores * dim, scores * dim)),
        (layers.Attention(use_scale=True), (scores * dim + scores, scores * dim)),
        (layers.Attention(score_mode="concat"), (scores, 2 * scores * dim)),
        (layers.Attention(score_mode="concat", use_scale=True), (scores * dim + scores, 2 * scores * dim)),
        (layers.AdditiveAttention(), (scores * dim, 2 * scores * dim)),
        (layers.AdditiveAttention(use_scale=False), (0, 2 * scores * dim)),
    ]:
        model = keras.Model([q, v, k], layer([q, v, k]))
        assert row(model, layer.name)["operations"] == floats(multiply + behind[0], add + behind[1])


def test_dot():
    a, b = keras.Input((6, 8)), keras.Input((7, 8))
    for axes in (2, -1, (2, 2)):
        layer = layers.Dot(axes)
        assert row(keras.Model([a, b], layer([a, b])), layer.name)["operations"] == floats(42 * 8, 42 * 8)
    a, b = keras.Input((8,)), keras.Input((8,))
    layer = layers.Dot(1, normalize=True)  # squares and divisions of 16 values, and their sums
    assert row(keras.Model([a, b], layer([a, b])), layer.name)["operations"] == floats(8 + 32, 8 + 16)


def test_attention_over_one_of_two_axes():
    x = keras.Input((3, 5, 16))
    model = keras.Model(x, layers.MultiHeadAttention(2, 8, attention_axes=(2,), name="mha")(x, x))
    expected = attention(5, 5, 2, 8, 8)  # three times
    assert row(model, "mha")["operations"] == {k: 3 * v for k, v in expected.items()}


def test_a_transformer_encoder():
    x = keras.Input((6, 16))
    mixed = layers.LayerNormalization()(layers.Add()([x, layers.MultiHeadAttention(4, 4)(x, x)]))
    wide = layers.Dense(16)(layers.Dense(64, activation="gelu")(mixed))
    model = keras.Model(x, layers.LayerNormalization()(layers.Add()([mixed, wide])))
    multiply = attention(6, 6, 4, 4, 4)["float32 multiply"] + 4 * 6 * 16 * 16 + 6 * (2 * 16 * 64 + 3 * 64) + 2 * 3 * 96
    add = attention(6, 6, 4, 4, 4)["float32 add"] + 4 * 6 * 16 * 17 + 6 * (64 * 17 + 16 * 65 + 64) + 2 * 4 * 96 + 2 * 96
    total = summary(model).total
    assert (total["multiplications"], total["additions"], total["complete"]) == (multiply, add, True)
    assert total["parameters"] == model.count_params()


# ---- recurrence

def test_keras_recurrent_layers():
    steps, dim, units = 6, 3, 4
    # tanh costs nothing here, a sigmoid one division and one addition
    simple = units * (dim + units), units * (dim + units + 2)  # products; the bias, and x + h
    plain = layers.SimpleRNN(units, name="rnn")
    assert counts(plain, shape=(steps, dim), name="rnn/simple_rnn_cell") == floats(*(steps * n for n in simple))
    # z, r, h': products; two biases each; two sigmoids; r h, z h, (1 - z) h'; and x + h for three gates, 1 - z, the last sum
    products = 3 * units * (dim + units)
    gru = products + 2 * units + 3 * units, products + 6 * units + 2 * units + 5 * units
    for options in ({}, {"unroll": True}, {"return_sequences": True}):
        layer = layers.GRU(units, name="rnn", **options)
        assert counts(layer, shape=(steps, dim), name="rnn/gru_cell") == floats(*(steps * n for n in gru))
    products = 4 * units * (dim + units)  # i, f, c', o; one bias each; three sigmoids; f c, i c', o tanh(c); x + h for four, and c
    lstm = products + 3 * units + 3 * units, products + 4 * units + 3 * units + 5 * units
    assert counts(layers.LSTM(units, name="rnn"), shape=(steps, dim), name="rnn/lstm_cell") == floats(*(steps * n for n in lstm))
    both = chain(layers.Bidirectional(layers.LSTM(units, name="rnn"), merge_mode="sum", name="both"), shape=(steps, dim))
    rows = {r["layer"]: r["operations"] for r in summary(both).rows}
    assert rows["both"] == floats(0, units)
    assert [v for k, v in rows.items() if k.endswith("lstm_cell")] == [floats(*(steps * n for n in lstm))] * 2
    stacked = chain(layers.RNN([layers.GRUCell(units, name="a"), layers.LSTMCell(units, name="b")], name="rnn"), shape=(steps, dim))
    rows = {r["layer"].split("/")[-1]: r["operations"] for r in summary(stacked).rows}
    assert rows["a"] == floats(*(steps * n for n in gru))
    wider = 4 * units * (units - dim)  # its inputs are the outputs of the other
    assert rows["b"] == floats(*(steps * (n + wider) for n in lstm))


def rows_of(model):
    return {r["layer"]: r["operations"] for r in summary(model).rows}


@pytest.mark.parametrize("sequences", [True, False])
def test_gru_mml(sequences):
    steps, dim, units = 6, 3, 4
    layer = GRUMML(units, return_sequences=sequences, forget_lower_bound=0.5, name="gru")
    rows, cell = rows_of(chain(layer, shape=(steps, dim))), layer.cell
    reads = steps if sequences else 1
    # the sigmoid of f (1, 1), silu (2, 1), the bound (1, 1), (1 - f) c (1, 1), f h + that (1, 1); that of g (1, 1) and g h where it is read
    assert rows[f"gru/{cell.name}"] == floats(units * (steps * 6 + reads * 2), units * (steps * 5 + reads))
    mapped = floats(steps * (3 * dim + 2 * units), steps * (dim + 2 * units))
    assert rows[f"gru/{cell.name}/input_map"] == {**mapped, "int32 add": steps * nonzero(cell.input_map)}
    assert rows[f"gru/{cell.name}/gate_map"] == floats(reads * dim * units, reads * (dim + 1) * units)
    assert rows[f"gru/{cell.name}/output_map"] == floats(reads * units**2, reads * units * (units + 1))


def test_gru_mml_step_by_step():
    "With a loop, too, the last outputs alone are read."
    steps, dim, units = 6, 3, 4
    for layer in (keras.layers.RNN(GRUCellMML(units, name="cell"), name="gru"), GRUMML(units, unroll=True, name="gru")):
        rows = rows_of(chain(layer, shape=(steps, dim)))
        cell = f"gru/{layer.cell.name}"
        assert rows[cell] == floats(units * (steps * 5 + 2), units * (steps * 4 + 1))
        assert rows[f"{cell}/output_map"] == floats(units**2, units * (units + 1))
        assert rows[f"{cell}/input_map"]["int32 add"] == steps * nonzero(layer.cell.input_map)


def test_lru_mml():
    steps, dim, units, states = 6, 3, 4, 5
    layer = LRUMML(units, states, fully_mml=True, return_sequences=True, name="lru")
    rows = rows_of(chain(layer, shape=(steps, dim)))
    # a complex product (4, 2) and sum (0, 2), the input's two parts times gamma; and the sum with the path past the state
    assert rows[f"lru/{layer.cell.name}"] == floats(steps * 6 * states, steps * (4 * states + units))
    assert rows[f"lru/{layer.cell.name}/output_map"]["int32 add"] == steps * nonzero(layer.cell.output_map)


@pytest.mark.parametrize("mixer", ["gru", "softmax"])
def test_transformer_block(mixer):
    block = TransformerBlockMML(16, 32, 4, mixer=mixer, name="block")
    model = chain(block, layers.Dense(10, name="head"), shape=(6, 16))
    result = summary(model)
    rows = {r["layer"]: r for r in result.rows}
    assert result.total["complete"] and result.total["parameters"] == model.count_params()
    assert rows["block"]["operations"] == floats(0, 2 * 6 * 16)
    assert rows["block/thinking"]["operations"] == floats(6 * 32 * 3, 6 * 32)  # silu and the product
    assert rows["block/thinking/down"]["operations"]["int32 add"] == 6 * nonzero(block.thinking.down)
    assert rows["block/mixing_norm"]["operations"] == floats(3 * 96, 96)
    if mixer == "softmax":
        assert rows["block/mixing/query"]["ternary_parameters"] == 256
    else:
        assert rows[f"block/mixing/forward/{block.mixing.forward_rnn.cell.name}/input_map"]["ternary_parameters"] == 16 * 48


def test_attention_mml_both_ways():
    model = chain(AttentionMML(2, 8, causal=False, name="mixer"), shape=(6, 8))
    rows = rows_of(model)
    assert rows["mixer"] == floats(48, 48)
    assert sum(name.endswith("input_map") for name in rows) == 2


# ---- models of all kinds

def test_mobilenet():
    model = keras.applications.MobileNetV2(weights=None, input_shape=(96, 96, 3))
    result = summary(model)
    by_hand, size, channels = 48 * 48 * 32 * 27, 48, 32  # the first convolution halves 96 x 96
    table = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expansion, out, repeats, stride in table:
        for block in range(repeats):  # table 2 of the paper, arXiv 1801.04381
            wide, s = expansion * channels, stride if block == 0 else 1
            by_hand += size**2 * channels * wide * (expansion > 1) + (size // s) ** 2 * wide * (9 + out)
            size, channels = size // s, out
    by_hand += size**2 * channels * 1280
    assert size == 3
    convolutions = [r for r in result.rows if "Conv" in r["class"]]
    assert sum(r["multiplications"] for r in convolutions) == by_hand
    assert len(convolutions) == 52 and all(r["bits_per_weight"] == 32 for r in convolutions)
    assert result.total["complete"] and result.total["parameters"] == model.count_params()
    assert result.total["bytes_packed"] == 4 * model.count_params() < result.file_size < 1.1 * 4 * model.count_params()


class Blocks(keras.Model):
    def __init__(self, depth, **kwargs):
        super().__init__(**kwargs)
        self.depth = depth
        self.blocks = [DenseMML(16, activation="relu", name=f"block_{i}") for i in range(depth)]
        self.heads = {"digit": layers.Dense(10, name="digit")}

    def get_config(self):
        return {**super().get_config(), "depth": self.depth}

    def call(self, x):
        for block in self.blocks:
            x = block(block(x))
        return self.heads["digit"](x)


def test_subclassed_models():
    model = Blocks(2, name="blocks")
    model(np.ones((5, 16), "float32"))
    for result in (summary(model), summary(model, input_shape=(None, 16)), summary(pack(model), input_shape=(1, 16))):
        rows = {r["layer"]: r for r in result.rows}
        assert rows["block_1"]["operations"]["int32 add"] == 2 * nonzero(model.blocks[1])
        assert rows["digit"]["operations"] == floats(160, 170)
        assert "blocks" not in rows  # its `call` computes nothing besides
        assert result.total["complete"] and result.total["parameters"] == model.count_params()


def test_nested_and_shared():
    shared = layers.Dense(8, name="shared")
    x = keras.Input((8,))
    inner = keras.Model(x, shared(shared(x)), name="inner")
    y = keras.Input((8,))
    outer = keras.Model(y, layers.Dense(2, name="head")(shared(inner(inner(y)))))
    rows = {r["layer"]: r for r in summary(outer).rows}
    (name,) = [n for n in rows if n.endswith("shared")]
    assert rows[name]["parameters"] == 72 and rows[name]["multiplications"] == 5 * 64
    assert summary(outer).total["parameters"] == outer.count_params() == 72 + 18
    timed = chain(layers.TimeDistributed(layers.Dense(8, name="inside"), name="timed"), shape=(6, 3))
    assert row(timed, "timed/inside")["operations"] == floats(6 * 24, 6 * 32)


def test_several_inputs():
    a, b = keras.Input((4,), name="a"), keras.Input((3, None), dtype="int32", name="b")
    vectors = layers.GlobalAveragePooling2D()(layers.Embedding(10, 4)(b))
    model = keras.Model({"a": a, "b": b}, layers.Dense(2, name="head")(layers.Concatenate()([a, vectors])))
    with pytest.raises(ValueError, match="input_shape"):
        summary(model)
    assert row(model, "head", input_shape={"a": (None, 4), "b": (None, 3, 7)})["operations"] == floats(16, 18)


class Pair(keras.Model):
    "Indices into a table, and weights for what is found there."

    def __init__(self):
        super().__init__(name="pair")
        self.table, self.head = layers.Embedding(10, 4), layers.Dense(3, name="head")

    def call(self, indices, weights, shift=None):
        vectors = self.table(indices) * ops.expand_dims(weights, -1)
        return self.head(vectors if shift is None else vectors + shift)


def test_several_arguments():
    class Sum(keras.Model):
        def __init__(self):
            super().__init__(name="sum")
            self.head = layers.Dense(3, name="head")

        def call(self, a, b):
            return self.head(a + b)

    model = Sum()
    model(np.ones((2, 4)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="'sum' cannot be called like this: missing.*'b'.*input_shape={'a': \\(1, 8\\), 'b': \\(1, 8\\)}"):
        summary(model)
    for shapes in ([(1, 4), (1, 4)], ((None, 4), [None, 4]), {"a": (1, 4), "b": (1, 4)}):
        assert row(model, "head", input_shape=shapes)["operations"] == floats(12, 15)
    with pytest.raises(ValueError, match="cannot be called"):
        summary(model, input_shape=[(1, 4)] * 3)


def test_layers_with_several_arguments_alone():
    mha = layers.MultiHeadAttention(2, 4, name="mha")
    mha.build((None, 6, 8), (None, 7, 8))
    for shapes in ([(1, 6, 8), (1, 7, 8)], {"query": (1, 6, 8), "value": (1, 7, 8)}, [(1, 6, 8), (1, 7, 8), (1, 7, 8)]):
        assert row(mha, "mha", input_shape=shapes)["operations"] == attention(6, 7, 2, 4, 4)
    cell = layers.GRUCell(4, name="cell")
    cell.build((None, 3))
    with pytest.raises(ValueError, match="'cell' cannot be called like this: missing.*'states'"):
        summary(cell)
    for shapes in ([(1, 3), [(1, 4)]], {"inputs": (1, 3), "states": [(1, 4)]}):
        assert summary(cell, input_shape=shapes).total["multiplications"] == 3 * 4 * 7 + 5 * 4


def test_a_sample():
    model, indices, weights = Pair(), np.array([[1, 2, 9], [3, 4, 0]]), np.ones((2, 3), "float32")
    model(indices, weights)
    for sample in ([indices, weights], (indices, weights), {"indices": indices, "weights": weights}, [indices, weights, np.ones(4)]):
        assert row(model, "head", sample=sample)["operations"] == floats(3 * 12, 3 * 15)
    known = chain(layers.Embedding(10, 4), layers.Dense(3, name="head"), shape=(None,), dtype="int32")
    assert row(known, "head", sample=indices)["operations"] == floats(3 * 12, 3 * 15)
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    named = keras.Model({"a": a, "b": b}, layers.Dense(3, name="head")(a + b))
    for sample in ({"a": np.ones((2, 4)), "b": np.ones((2, 4))}, [ops.ones((2, 4)), np.ones((2, 4))]):
        assert row(named, "head", sample=sample)["operations"] == floats(12, 15)


def test_wrong_samples_and_shapes():
    a, b = keras.Input((4,)), keras.Input((4,))
    two = keras.Model([a, b], layers.Dense(3, name="head")(a + b))
    for wrong in (dict(input_shape=(1, 4)), dict(sample=np.ones((1, 4))), dict(input_shape=[(1, 4)] * 3)):
        with pytest.raises(ValueError, match="has 2 inputs. Received: [13]"):
            summary(two, **wrong)
    one = chain(layers.Dense(3), shape=(4,))
    for shape in ("abc", (), 3, (1, "4"), (0, 4), (1, -4), [(1, 4), "x"], {}):
        with pytest.raises(ValueError, match="invalid value for `input_shape`.*Received"):
            summary(one, input_shape=shape)
    for sample in ("abc", [], 3, np.ones((0, 4)), [[1.0, 2.0]], {}, np.float32(1)):
        with pytest.raises(ValueError, match="invalid value for `sample`.*Received"):
            summary(one, sample=sample)
    with pytest.raises(ValueError, match="either"):
        summary(one, input_shape=(1, 4), sample=np.ones((1, 4)))


def test_a_layer_alone():
    layer = layers.MultiHeadAttention(2, 4, name="mha")
    layer(np.ones((5, 6, 8), "float32"), np.ones((5, 7, 8), "float32"))
    result = summary(layer)
    assert result.rows[0]["operations"] == attention(6, 7, 2, 4, 4)
    assert result.file_size is None and "a layer" in str(result)
    dense = DenseMML(3)
    dense.build((None, 4))
    assert summary(dense).total["ternary_parameters"] == 12


def test_a_fixed_batch_and_states():
    layer = layers.GRU(4, stateful=True, name="gru")
    model = keras.Sequential([keras.Input(batch_shape=(3, 5, 2)), layer])
    model(np.random.default_rng(0).normal(size=(3, 5, 2)))
    before = np.array(ops.convert_to_numpy(layer.states[0]))
    single = counts(layers.GRU(4, name="gru"), shape=(5, 2), name="gru/gru_cell")
    assert row(model, "gru/gru_cell")["operations"] == single  # of each sample, not of the three
    assert np.abs(before).max() > 0 and np.array_equal(before, ops.convert_to_numpy(layer.states[0]))


def test_the_model_stays_as_it_is():
    model = chain(DenseMML(8), layers.GRU(4), shape=(5, 3))
    model.compile("adam", "mse")
    model.fit(np.ones((8, 5, 3)), np.ones((8, 4)), verbose=0)
    x, weights = np.ones((2, 5, 3), "float32"), model.get_weights()
    outputs, iterations = model.predict(x, verbose=0), int(model.optimizer.iterations)
    summary(model)
    for layer in model._flatten_layers():
        assert "call" not in vars(layer) and vars(layer).get("use_cudnn") in (None, "auto")
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))
    assert np.array_equal(outputs, model.predict(x, verbose=0))
    assert model.compiled and int(model.optimizer.iterations) == iterations > 0
    model.fit(np.ones((8, 5, 3)), np.ones((8, 4)), verbose=0)

    class Breaks(layers.Layer):
        def call(self, x):
            return x if any(d is None for d in x.shape) else 1 / 0

        def compute_output_shape(self, shape):
            return shape

    dense = layers.Dense(2)
    broken = keras.Sequential([keras.Input((3,)), dense, Breaks()])
    with pytest.raises(ZeroDivisionError):
        summary(broken)
    assert "call" not in vars(dense)


# ---- memory

def stored(path):
    "Bytes of all datasets in a `.keras` file."
    sizes = []
    with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as file, h5py.File(file) as weights:
        weights.visititems(lambda _, item: sizes.append(item.nbytes) if isinstance(item, h5py.Dataset) else None)
    return sum(sizes)


@rows(TERNARY)
def test_bytes_of_every_layer_are_those_of_packed_models(cases, tmp_path):
    model = side_by_side(cases)
    packed = pack(model)
    packed.save(tmp_path / "packed.keras")
    latent, shipped = summary(model), summary(packed)
    total = latent.total
    assert shipped.total == total and [r["operations"] for r in shipped.rows] == [r["operations"] for r in latent.rows]
    assert total["bytes_packed"] == stored(tmp_path / "packed.keras")
    assert total["bytes_packed_in_memory"] == sum(ops.convert_to_numpy(w).nbytes for w in packed.weights)
    assert total["bits_per_weight"] == 8 * total["bytes_packed_in_memory"] / model.count_params()
    assert total["bytes_float32"] == 4 * model.count_params()
    for size in (latent.file_size, shipped.file_size):
        assert size == pytest.approx((tmp_path / "packed.keras").stat().st_size, rel=0.001)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_file_of_the_mnist_classifier(tmp_path, compiled):
    model = chain(*[DenseMML(256, activation="relu") for _ in range(3)], DenseMML(10), shape=(784,))
    if compiled:
        model.compile("adam", "sparse_categorical_crossentropy")
        model.fit(np.ones((4, 784)), np.ones(4), verbose=0)  # the optimizer has a state now, which is not for the file
    result = summary(model)
    pack(model).save(tmp_path / "packed.keras")
    assert result.file_size == pytest.approx((tmp_path / "packed.keras").stat().st_size, rel=0.02)
    # by hand: kernels of 5 trits a byte, then scale, biases, checksum
    by_hand = sum(math.ceil(k * n / 5) + 4 + 4 * n + 4 for k, n in [(784, 256), (256, 256), (256, 256), (256, 10)])
    assert result.total["bytes_packed"] == by_hand < result.file_size
    assert result.rows[0]["bytes_int8"] == 784 * 256 + 4 * 256 and result.rows[0]["parameters"] == 784 * 256 + 256
    assert 2 < result.rows[0]["bits_per_weight"] < 2.1
    zeros = sum((layer.ternary_state()["trits"] == 0).sum() for layer in model.layers)
    assert result.total["zeros"] == zeros / 334336


def test_what_cannot_be_packed_or_saved():
    class Halves(StraightThroughQuantizer):
        def quantize(self, x):
            return ops.round(x * 2), 0.5

    result = summary(chain(DenseMML(3, scale=Halves(), kernel_initializer="ones", name="halves"), shape=(4,)))
    assert result.rows[0]["ternary_parameters"] == 0 and result.rows[0]["bits_per_weight"] == 32
    assert result.rows[0]["operations"]["float32 add"] == 12 + 4 + 3  # products in float, the norm, biases
    assert result.file_size is None and "cannot be packed" in str(result) and "cannot be packed" in result._repr_html_()

    class NoConfig(keras.Model):
        def __init__(self, secret):
            super().__init__()
            self.dense = DenseMML(secret.size)

        def call(self, x):
            return self.dense(x)

    model = NoConfig(np.ones(3))
    model(np.ones((1, 4)))
    assert summary(model).file_size is None and "could not be copied" in str(summary(model))


# ---- what is not known

def test_layers_of_anybody_count():
    class Squares(layers.Dense):
        def call(self, x):
            return super().call(x) ** 2

    assert counts(Squares(3), shape=(4,)) == floats(12 + 3, 12 + 3)
    assert counts(layers.Lambda(lambda x: x * 2), shape=(4,)) == floats(4, 0)
    assert counts(layers.Dense(5, activation=lambda x: x**3 - 1), shape=(4,)) == floats(20 + 2 * 5, 20 + 5 + 5)
    result = summary(chain(layers.Dense(5, activation=layers.LeakyReLU()), shape=(4,)))
    assert result.total["complete"] and result.total["multiplications"] == 20 + 5

    class Ternary(layers.Layer):
        "Rounds its inputs and its kernel by itself."

        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], 5), initializer="glorot_uniform")

        def call(self, x):
            return ops.matmul(ops.round(x), ops.round(ops.clip(3 * self.kernel, -1, 1)))

    ternary = Ternary()
    found = counts(ternary, shape=(6, 4))
    trits = np.abs(ops.convert_to_numpy(ternary.kernel)) > 1 / 6
    assert found == {"int32 add": 6 * np.count_nonzero(trits)} and 0 < trits.mean() < 1
    # a variable full of zeros is not ternary
    assert counts(layers.Lambda(ops.round), layers.Dense(3, kernel_initializer="zeros"), shape=(4,)) == floats(12, 15)


def test_layers_of_integers():
    "Where they can be traced: their gradient is a function of the backend, which torch alone lets see the symbols."
    quantized = chain(layers.Dense(5, name="quantized"), shape=(4,))
    quantized.quantize("int8")
    result = summary(quantized)
    if keras.backend.backend() != "torch":
        assert "quantized' cannot be traced" in result.notes[-1] and not result.total["complete"]
        return
    found = result.rows[0]["operations"]
    assert found["int8 multiply"] == 20 and found["int32 add"] == 20
    assert found["float32 add"] == 5 + 1  # the bias, and the epsilon of the scale of the inputs


def test_random_numbers_and_states_are_no_obstacle():
    class Sampling(layers.Layer):
        def __init__(self):
            super().__init__(name="sampling")
            self.seed_generator = keras.random.SeedGenerator(0)

        def call(self, x):
            return x + 2 * keras.random.normal(ops.shape(x), seed=self.seed_generator) * x

    layer = Sampling()
    before = ops.convert_to_numpy(layer.seed_generator.state)
    assert counts(layer, shape=(4,))["float32 add"] == 4
    assert np.array_equal(before, ops.convert_to_numpy(layer.seed_generator.state))


def test_two_layers_of_one_name():
    class Both(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = layers.Dense(3, name="same"), layers.Dense(5, name="same")

        def call(self, x):
            return self.second(self.first(x))

    model = Both()
    model(np.ones((1, 4)))
    assert [r["operations"] for r in summary(model).rows] == [floats(12, 15), floats(15, 20)]


def test_layers_that_no_attribute_holds_count_where_they_are_called():
    inner = layers.Dense(3)
    inner.build((None, 4))
    assert counts(layers.Lambda(lambda x: inner(x)), shape=(4,)) == floats(12, 15)


def test_unknown_is_never_zero():
    class Inverse(layers.Layer):
        def call(self, x):
            return 2 * ops.linalg.inv(x)

    result = summary(chain(layers.Dense(5), layers.Dense(4), Inverse(name="strange"), shape=(4, 4)))
    assert result.rows[-1]["multiplications"] == 16 and not result.rows[-1]["complete"] and result.rows[-1]["unknown"] == "Inv"
    assert not result.total["complete"] and "Inv in strange (Inverse)" in result.notes[-1] and "≥ 16" in str(result)
    result = summary(chain(layers.Lambda(ops.linalg.inv, name="strange"), shape=(4, 4)))
    assert result.rows[-1]["multiplications"] is None and result.rows[-1]["energy_pj"] is None


def test_what_cannot_be_traced_is_named():
    class OnData(layers.Layer):
        def call(self, x):
            return x if ops.max(x) > 1 else -x

        def compute_output_shape(self, shape):
            return shape

    model = keras.Sequential([DenseMML(5, name="dense"), OnData(name="chooses")], name="model")
    model(np.ones((1, 4)))
    result = summary(model)
    assert "no operations are known. Layer 'model/chooses' cannot be traced" in result.notes[-1]
    assert result.total["multiplications"] is None and not result.total["complete"]
    assert result.total["parameters"] == 25 and result.rows[-1]["bytes_packed"] == 4 + 4 + 4 + 4 * 5
    empty = keras.Sequential([OnData()])
    empty(np.ones((1, 4)))
    assert not summary(empty).total["complete"]


def test_every_primitive_has_a_cost():
    assert PRIMITIVES.keys() <= COSTS.keys()
    for exponent, multiplications in [(1, 0), (2, 1), (3, 2), (4, 2), (-1, 1), (7, 4), (0.5, 1)]:
        assert COSTS["Power"](3, x2=exponent) == (3 * multiplications, 0)


def test_loops():
    "Where x is (6, 4): a sum of the rows so far, which each step needs; its square, which is read of the last; a cube, which nobody reads."

    class Loop(layers.Layer):
        def call(self, x):
            def step(carry, row):
                total = carry[0] + row
                return [total, total * total], total * total * total

            return ops.scan(step, [ops.zeros_like(x[0]), ops.zeros_like(x[0])], x)[0][1]

    assert operations(trace(Loop(name="loop"), np.ones((6, 4), "float32")))["loop"] == {"float32 add": 6 * 4, "float32 multiply": 4}


def test_products_of_complex_numbers():
    class Complex(layers.Layer):
        def call(self, x):
            z = ops.cast(x, "complex64")
            return ops.real(z * z + z)

    assert counts(Complex(), shape=(5,)) == floats(4 * 5, 2 * 5 + 2 * 5)


@pytest.mark.any_backend
def test_energy():
    assert ENERGY_PJ == {
        "float32 multiply": 3.7, "float32 add": 0.9, "int32 multiply": 3.1, "int32 add": 0.1, "int8 multiply": 0.2, "int8 add": 0.03,
    }  # fmt: skip
    assert row(chain(layers.Dense(5, name="dense"), shape=(7,)), "dense")["energy_pj"] == pytest.approx(35 * 3.7 + 40 * 0.9)
    layer = DenseMML(5, name="dense")
    energy = row(chain(layer, shape=(7,)), "dense")["energy_pj"]
    assert energy == pytest.approx((21 + 5) * 3.7 + (7 + 5) * 0.9 + nonzero(layer) * 0.1)


def test_errors():
    with pytest.raises(ValueError, match="`summary` takes a Keras model or layer. Received: 3"):
        summary(3)
    with pytest.raises(ValueError, match="first"):
        summary(keras.Sequential([layers.Dense(3)]))
    images = keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(8, 3, name="conv")])
    with pytest.raises(ValueError, match="input_shape"):
        summary(images)
    with pytest.raises(ValueError, match="input_shape"):
        summary(images, input_shape=(1, None, 28, 3))
    assert row(images, "conv", input_shape=(None, 5, 5, 3))["operations"] == floats(9 * 8 * 27, 9 * 8 * 28)


# ---- display

@pytest.mark.any_backend
def test_display(capsys):
    result = summary(chain(DenseMML(64, name="<hidden>"), layers.Dense(10, name="head"), shape=(784,)))
    assert keras_mml.summary is summary
    text, page = str(result), result._repr_html_()
    assert "\x1b" not in text and repr(result) == text
    assert all(line == line.rstrip() for line in text.splitlines())
    for shown in ("<hidden>", "DenseMML", "50.2 k", "saved, packed: ", "Horowitz", "total"):
        assert shown in text
    assert "&lt;hidden&gt;" in page and "<hidden>" not in page and "Horowitz" in page
    assert page.count("<tr>") == 4 and "color" not in page and "text-align: right" in page
    assert json.loads(json.dumps(result.to_dict()))["total"]["parameters"] == 784 * 64 + 64 + 650
    assert {type(v) for v in result.total.values()} <= {int, float, str, dict, bool}


@pytest.mark.any_backend
def test_names_are_not_markup():
    result = str(summary(chain(DenseMML(4, name="conv[a]"), layers.Dense(3, name="[bold]x"), layers.Dense(3, name=":smile:"), shape=(4,))))
    assert all(name in result for name in ("conv[a]", "[bold]x", ":smile:")) and "\x1b" not in result


@pytest.mark.any_backend
def test_why_there_is_no_file_is_short(monkeypatch):
    from keras_mml import inspection

    def fail(model):
        raise ValueError("It is not possible. " + "Because of this and that. " * 20)

    monkeypatch.setattr(inspection, "_packed_copy", fail)
    assert summary(chain(layers.Dense(3), shape=(4,))).saved == "not possible. It is not possible."
    monkeypatch.undo()
    saved = summary(chain(layers.Lambda(lambda x: x * 2), shape=(4,))).saved
    assert len(saved) < 140 and "\n" not in saved


@pytest.mark.any_backend
def test_units():
    from keras_mml.inspection import _bytes, _joules, _short
    assert [_short(n) for n in (0, 5, 999, 1000, 999_500, 200_960, 1_050_000)] == ["0", "5", "999", "1 k", "1 M", "201 k", "1.05 M"]
    assert [_bytes(70_013), _joules(47_068.0), _joules(1.5e6), _joules(0)] == ["70 kB", "47.1 nJ", "1.5 µJ", "0 pJ"]


@pytest.mark.any_backend
def test_dataframe(monkeypatch):
    pandas = pytest.importorskip("pandas")
    result = summary(chain(layers.Dense(5, name="dense"), shape=(7,)))
    table = result.to_dataframe()
    assert isinstance(table, pandas.DataFrame) and table.loc["dense", "parameters"] == 40
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        result.to_dataframe()


# ---- plots

@pytest.fixture
def model():
    yield chain(Conv2DMML(8, 3, name="conv"), layers.Flatten(), DenseMML(5, scale="channel", name="dense"), shape=(6, 6, 1))
    matplotlib.pyplot.close("all")


@pytest.mark.any_backend
def test_plots_of_weights(model):
    axes = plot_latent_weights(model)
    assert [ax.get_title() for ax in axes] == ["conv", "dense"]
    for ax, name in zip(axes, ("conv", "dense"), strict=True):
        trits = model.get_layer(name).ternary_state()["trits"]
        assert [text.get_text() for text in ax.texts] == [f"{(trits == t).mean():.0%}" for t in (-1, 0, 1)]
        heights = [sum(bar.get_height() for bar in bars) for bars in ax.containers]
        assert heights == [(trits == t).sum() for t in (-1, 0, 1)]
        assert [line.get_xdata()[0] for line in ax.lines] == [-0.5, 0.5]
    for m in (model, pack(model)):
        conv, dense = plot_trits(m)
        assert np.array_equal(dense.images[0].get_array(), model.get_layer("dense").ternary_state()["trits"])
        trits = model.get_layer("conv").ternary_state()["trits"]
        assert np.array_equal(conv.images[0].get_array()[5:8, 9:12], trits[:, :, 0, 5])  # three tiles a row: the sixth filter
    _, ax = matplotlib.pyplot.subplots()
    assert plot_trits(model.get_layer("dense"), ax)[0] is ax and plot_latent_weights(model.get_layer("dense"), axes=[ax])[0] is ax
    with pytest.raises(ValueError, match="2 pictures"):
        plot_trits(model, ax)


@pytest.mark.any_backend
def test_histograms_lose_no_weight():
    "Also not the largest ones, which stand in the last bars."
    layer = DenseMML(5, name="dense")
    layer.build((None, 7))
    for number in range(20):
        layer.kernel.assign(np.random.default_rng(number).standard_t(2, size=(7, 5)))
        (ax,) = plot_latent_weights(layer)
        assert sum(bar.get_height() for bars in ax.containers for bar in bars) == 35
        matplotlib.pyplot.close("all")


def test_plots_of_activations(model):
    x = np.random.default_rng(0).normal(size=(20, 6, 6, 1)).astype("float32")
    limits = []
    for m in (model, pack(model)):
        ax = plot_activations(m, x)
        assert [label.get_text() for label in ax.get_yticklabels()] == ["dense", "conv"]
        limits.append([line.get_xdata() for line in ax.lines])
        rows = x.reshape(20, -1) / np.sqrt((x.reshape(20, -1) ** 2).mean(-1, keepdims=True) + 1e-6)
        ends = [d for d in limits[-1] if len(d) == 2 and np.allclose(d, [rows.min(), rows.max()], rtol=1e-4)]
        assert ends, "the smallest and the largest value of what the convolution rounds"
    assert all(np.allclose(a, b, atol=1e-3) for a, b in zip(*limits, strict=True))
    assert all("call" not in vars(layer) for layer in model.layers)


@pytest.mark.any_backend
def test_plots_of_graphs(model):
    class Loop(layers.Layer):
        def call(self, x):
            return ops.scan(lambda carry, row: (ops.tanh(carry + row), row), x[0], x)[0]

    picture = plot_graph(trace(model))
    svg = ElementTree.fromstring(str(picture))
    texts = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    titles = ["inputs", *(layer.name for layer in model.layers), "outputs"]
    assert [text for text in texts if text in titles] == titles
    assert "batch × 6 × 6 × 1" in texts and "batch × 5" in texts and picture._repr_svg_() == str(picture)
    texts = [text.text for text in ElementTree.fromstring(str(plot_graph(trace(Loop(name="<loop>"), np.ones((4, 3)))))).iter() if text.text]
    assert texts[texts.index("4 times:") :][:3] == ["4 times:", "  Add", "  Tanh"] and "<loop>" in texts


@pytest.mark.any_backend
def test_plots_of_costs(model):
    other = chain(layers.Conv2D(8, 3), layers.Flatten(), layers.Dense(5), shape=(6, 6, 1))
    memory, energy = plot_costs(other, summary(model))
    assert [bar.get_height() for bar in memory.patches] == [summary(m).total["bytes_packed"] for m in (other, model)]
    assert [bar.get_height() for bar in energy.patches] == [summary(m).total["energy_pj"] for m in (other, model)]
    ax = plot_accuracy_against_bits({"a": (100, 0.9), "b": (2000, 0.95)})
    assert [tuple(line.get_xydata()[0]) for line in ax.lines] == [(100, 0.9), (2000, 0.95)]
    assert [text.get_text() for text in ax.texts] == ["a", "b"] and ax.get_xscale() == "log"


def test_plots_of_activations_with_several_arguments():
    class Sum(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = DenseMML(3, name="head")

        def call(self, a, b):
            return self.head(a + b)

    model, x = Sum(), np.random.default_rng(0).normal(size=(2, 4)).astype("float32")
    model(x, x)
    assert [label.get_text() for label in plot_activations(model, [x, x]).get_yticklabels()] == ["head"]
    matplotlib.pyplot.close("all")


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "results",
    [None, {}, 3, {"a": 5}, {"a": (1, 2, 3)}, {"a": (0, 0.9)}, {"a": (-1, 0.9)}, {"a": (100, 95)}, {"a": ("1", 0.9)}, {"a": (1, math.nan)}],
)
def test_points_that_are_none(results):
    with pytest.raises(ValueError, match="invalid value for `results`.*accuracy from 0 to 1. Received"):
        plot_accuracy_against_bits(results)


def test_plots_say_what_is_missing(model):
    with pytest.raises(ValueError, match="invalid value for `x`.*at least one sample"):
        plot_activations(model, np.ones((0, 6, 6, 1)))
    plain = chain(layers.Dense(3), shape=(4,))
    for plot in (plot_latent_weights, plot_trits, lambda m: plot_activations(m, np.ones((2, 4)))):
        with pytest.raises(ValueError, match="no ternary layer"):
            plot(plain)
        with pytest.raises(ValueError, match="Expected a Keras model"):
            plot("model")
    with pytest.raises(ValueError, match="not built"):
        plot_trits(DenseMML(3))
    with pytest.raises(ValueError, match="no latent weights"):
        plot_latent_weights(pack(model))


def test_threads_that_look_at_one_model_leave_it_as_it_was():
    model = chain(DenseMML(5), layers.Dense(3), shape=(4,))
    expected, before = summary(model).to_dict(), [vars(layer).get("call") for layer in model.layers]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: summary(model).to_dict(), range(8)))
    assert all(result["total"] == expected["total"] for result in found)
    assert [vars(layer).get("call") for layer in model.layers] == before == [None, None]


def test_comparisons_are_known_and_cost_nothing():
    inputs = keras.Input((5,), dtype="int32")
    model = keras.Model(inputs, layers.GRU(3)(layers.Embedding(7, 4, mask_zero=True)(inputs)))  # with `NotEqual` for the mask
    assert all(r["complete"] for r in summary(model).rows)
    floats = keras.Input((6,))
    chosen = keras.Model(floats, ops.clip(ops.where(ops.logical_and(floats > 0, floats <= 2), floats, ops.sign(floats)), -1, 1))
    total = summary(chosen).total
    assert total["complete"] and (total["multiplications"], total["additions"]) == (0, 0)


@pytest.mark.with_tensorflow
@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="which has texts")
def test_models_of_texts_are_named():
    texts = keras.Input((1,), dtype="string", name="words")
    model = keras.Model(texts, layers.Embedding(3, 4)(layers.StringLookup(vocabulary=["a", "b"])(texts)), name="reader")
    with pytest.raises(ValueError, match="'reader' takes texts, which are tensors with tensorflow only"):
        summary(model)
