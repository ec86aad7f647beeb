"""The table of all layers: each with arguments, what it is fed with, and what is expected of it. Every test file draws from it.

A new layer is tested by its row: by Keras' conformance test, in training, saving, packing, the runtime, ONNX, on several devices, and so on.
"""

# ruff: noqa: E501, F405
import keras
import numpy as np
import pytest
from keras import ops

from keras_mml.layers import *  # noqa: F403
from keras_mml.layers import MultiHeadAttentionMML, Patches, RMSNorm, TokenEmbedding
from keras_mml.layers.packed import PackableLayer
from keras_mml.quantizers import AbsmaxInt, AbsmeanTernary
from keras_mml.testing import SHORT

BACKEND = keras.backend.backend()
FULL = not SHORT
SIZES = ("units", "filters", "kernel_size", "intermediate_size", "num_heads", "embedding_dim", "ffn_dim", "num_patches", "max_len", "vocab_size")


def lengths(short, full):
    "Parameters of a test that is long: with KERAS_MML_SHORT=1 the short form. The form that was not run is in the report."
    if FULL:
        return [full]
    return [short, pytest.param(full, marks=pytest.mark.skip(reason=f"The short form ran, with {short:,}; at full length, {full:,}"))]


class Case:
    "A layer, what it is fed with, and what is expected of it."

    def __init__(self, cls, arguments, input_shape, output_shape, weights, tokens=0, masks=True, losses=0):
        self.cls, self.arguments, self.input_shape, self.output_shape = cls, arguments, input_shape, output_shape
        self.weights, self.tokens, self.masks, self.losses = weights, tokens, masks, losses
        named = {k: v if isinstance(v, (bool, int, float, str, type(None))) else type(v).__name__ for k, v in arguments.items() if k not in SIZES}
        self.name = cls.__name__ + "".join(f" {k}={v}" for k, v in named.items())
        self.dtype = "int32" if tokens else "float32"

    def make(self, **arguments):
        return self.cls(**{**self.arguments, **arguments})

    def apply(self, layer, x):
        y = layer(x, x) if self.cls is MultiHeadAttentionMML else layer(x)
        return y[0] if isinstance(y, (tuple, list)) else y

    def data(self, rows=None, seed=0):
        shape = (rows or self.input_shape[0], *self.input_shape[1:])
        rng = np.random.default_rng(seed)
        return rng.integers(1, self.tokens, shape) if self.tokens else rng.normal(size=shape).astype("float32")

    def input(self, **kwargs):
        return keras.Input(self.input_shape[1:], dtype=self.dtype, **kwargs)

    def head(self, x, **arguments):
        "The layer, with a normalisation before sequences and two outputs behind it."
        if len(self.input_shape) == 3 and not self.tokens:
            x = RMSNorm()(x)
        return keras.layers.Dense(2)(keras.layers.Flatten()(self.apply(self.make(**arguments), x)))

    def model(self, **options):
        "The layer in a model that can be trained."
        inputs = self.input()
        model = keras.Model(inputs, self.head(inputs))
        model.compile(keras.optimizers.Adam(0.01), "mse", **options)
        return model

    @property
    def ternary(self):
        "Whether it has kernels that can be packed."
        return self.cls not in (TokenEmbedding, Patches, RMSNorm) and self.arguments.get("use_mml", True)


T, S, I = (2, 6, 8), (2, 16, 8), (2, 8, 8, 4)  # noqa: E741
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
    Case(Conv3DMML, dict(filters=5, kernel_size=(2, 3, 3), strides=(1, 2, 2), padding="same"), (2, 3, 6, 6, 4), (2, 3, 3, 3, 5), 2, masks=False),
    Case(DepthwiseConv2DMML, dict(kernel_size=3, depth_multiplier=2), I, (2, 6, 6, 8), 2, masks=False),
    Case(RMSNorm, dict(use_bias=True), (2, 8), (2, 8), 2),
]  # fmt: skip
# Layers that take two inputs, which Sequential and TimeDistributed cannot give them.
ATTENTION = [
    Case(MultiHeadAttentionMML, dict(num_heads=2, key_dim=4), T, T, 8),
    Case(MultiHeadAttentionMML, dict(num_heads=4, key_dim=4, num_key_value_heads=2, rotary=True, fully_mml=False, use_bias=False), T, T, 4),
]
EVERY = CASES + ATTENTION
# Arguments that change neither the class nor the way of the data: for Keras' conformance test, and for saving and resuming.
VARIANTS = [
    Case(DenseMML, dict(units=5, activation="relu", use_bias=False), T, (2, 6, 5), 1),
    Case(DenseMML, dict(units=5, norm=None, scale="channel", activation_bits=4), I, (2, 8, 8, 5), 2),
    Case(DenseMML, dict(units=5, norm=None, use_bias=False), T, (2, 6, 5), 1),
    Case(DenseMML, dict(units=5, norm_gain=True, activation_bits=4, kernel_regularizer="l2", bias_constraint="non_neg"), T, (2, 6, 5), 3, losses=1),
    Case(DenseMML, dict(units=5, scale=AbsmeanTernary("channel"), activation_bits=AbsmaxInt(6)), (2, 8), (2, 5), 2),
    Case(RMSNorm, {}, T, T, 1),
    Case(RMSNorm, dict(has_learnable_weights=False), (2, 8), (2, 8), 0),
    Case(RMSNorm, dict(use_bias=True, gain_regularizer="l2", bias_initializer="ones"), T, T, 2, losses=1),
    Case(GRUMML, dict(units=6, num_heads=3, forget_lower_bound=[0.1, 0.5, 0.9], learn_lower_bound=True, return_sequences=True), T, (2, 6, 6), 7),
    # On jax, Keras' attention wants values as long as keys.
    Case(MultiHeadAttentionMML, dict(num_heads=4, key_dim=2, num_key_value_heads=2, rotary=True, use_bias=False, value_dim=2 if BACKEND == "jax" else 3), T, T, 4),
    Case(MultiHeadAttentionMML, dict(num_heads=2, key_dim=4, fully_mml=False, dropout=0.0, output_shape=6), T, (2, 6, 6), 8),
]  # fmt: skip
# Cells, which a layer of Keras calls once a step, with the shapes of their states.
CELLS = [
    (GRUCellMML, dict(units=6, num_heads=2, fully_mml=True), [(2, 3), (2, 3)]),
    (LRUCellMML, dict(units=5, state_dim=7), [(2, 7), (2, 7)]),
]


FIRST = [max((case for case in EVERY if case.cls is cls), key=lambda case: len(case.arguments)) for cls in {case.cls: 0 for case in EVERY}]
SHORT_ROWS = SHORT and BACKEND != "torch"  # which compile for every row
LATER = pytest.mark.skip(reason="Run short, one row of a class is enough on jax and tensorflow: that with the most arguments.")


def each(cases, short=FIRST):
    "A test of each row."
    some = [case if case in short or not SHORT_ROWS else pytest.param(case, marks=LATER) for case in cases]
    return pytest.mark.parametrize("case", some, ids=lambda case: case.name)


def rows(cases):
    "A test of many rows that are compiled together."
    if not SHORT_ROWS:
        return pytest.mark.parametrize("cases", [cases], ids=["every row"])
    short = [case for case in cases if case in FIRST]
    return pytest.mark.parametrize("cases", [short, pytest.param(cases, marks=LATER)], ids=["one row a class", "every row"])


every_case = each(EVERY)
TERNARY = [case for case in EVERY if case.ternary]
ternary_cases = each(TERNARY)


def side_by_side(cases, **arguments):
    "All cases in one model, each with an input and an output of its own, so that what takes long, such as compilation, is done once."
    inputs = {str(number): case.input(name=str(number)) for number, case in enumerate(cases)}
    return keras.Model(inputs, {name: case.head(inputs[name], **arguments) for name, case in zip(inputs, cases, strict=True)})


def data_side_by_side(cases, rows, seed=0):
    return {str(number): case.data(rows, seed) for number, case in enumerate(cases)}


def array(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def shaken(model, size):
    "The model with noise on every weight: zeros, such as biases start with, stop gradients, and exact halves may be rounded either way."
    rng = np.random.default_rng(1)
    for weight in model.trainable_weights:
        weight.assign(weight + size * rng.normal(size=weight.shape))
    return model


def packable(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, PackableLayer)]
