"""Small models of the kinds that Keras' examples show, none of them made of layers of this package. `KINDS` maps names to functions that
return a model and inputs for it."""

import keras
import numpy as np
from keras import layers as L
from keras import ops

RNG = np.random.default_rng(0)
KINDS = {}


def kind(function):
    KINDS[function.__name__] = function
    return function


def floats(*shape):
    return RNG.normal(size=shape).astype("float32")


def integers(highest, *shape):
    return RNG.integers(1, highest, shape).astype("int32")


def functional(shape, build, dtype="float32"):
    inputs = keras.Input(shape, dtype=dtype)
    return keras.Model(inputs, build(inputs))


@kind
def convnet():
    stages = [layer for filters in (8, 16) for layer in (L.Conv2D(filters, 3, activation="relu"), L.MaxPooling2D())]
    head = [L.Flatten(), L.Dropout(0.5), L.Dense(10, "softmax")]
    return keras.Sequential([keras.Input((28, 28, 1)), L.Rescaling(1 / 255), *stages, *head]), floats(3, 28, 28, 1)


@kind
def residual_network():
    def build(x):
        for filters in (8, 16):
            shortcut = L.Conv2D(filters, 1, 2, "same")(x)
            y = L.ReLU()(L.BatchNormalization()(L.SeparableConv2D(filters, 3, padding="same")(x)))
            x = L.add([L.MaxPooling2D(3, 2, "same")(L.BatchNormalization()(y)), shortcut])
        return L.Dense(3)(L.GlobalAveragePooling2D()(L.Activation("gelu")(x)))

    return functional((16, 16, 3), build), floats(3, 16, 16, 3)


class PatchEncoder(L.Layer):
    def __init__(self, patches, dim):
        super().__init__()
        self.patches, self.projection, self.positions = patches, L.Dense(dim), L.Embedding(patches, dim)

    def call(self, x):
        return self.projection(x) + self.positions(ops.expand_dims(ops.arange(self.patches), 0))


@kind
def vision_transformer():
    def build(x):
        x = PatchEncoder(16, 12)(L.Reshape((16, 48))(ops.image.extract_patches(x, 4)))
        for _ in range(2):
            y = L.LayerNormalization(epsilon=1e-6)(x)
            x = L.Add()([x, L.MultiHeadAttention(2, 6, dropout=0.1)(y, y)])
            y = L.Dropout(0.1)(L.Dense(12)(L.Dense(24, keras.activations.gelu)(L.LayerNormalization(epsilon=1e-6)(x))))
            x = L.Add()([x, y])
        return L.Dense(5)(L.Flatten()(x))

    return functional((16, 16, 3), build), floats(3, 16, 16, 3)


@kind
def mlp_mixer():
    def build(x):
        for _ in range(2):
            y = L.Permute((2, 1))(L.LayerNormalization()(x))
            x = x + L.Permute((2, 1))(L.Dense(9)(L.Dense(20, "gelu")(y)))
            x = x + L.Dense(8)(L.Dense(20, "gelu")(L.LayerNormalization()(x)))
        return L.Dense(4)(L.GlobalAveragePooling1D()(x))

    return functional((9, 8), build), floats(3, 9, 8)


class Mixing(L.Layer):
    def call(self, x):
        return ops.real(ops.cast(x, "complex64")) * ops.sigmoid(ops.roll(x, 1, axis=1))


@kind
def own_mixing():
    return functional((9, 8), lambda x: L.Dense(2)(ops.max(Mixing()(x), axis=1))), floats(3, 9, 8)


class TokenAndPosition(L.Layer):
    def __init__(self, length, words, dim):
        super().__init__()
        self.tokens, self.positions, self.length = L.Embedding(words, dim, mask_zero=True), L.Embedding(length, dim), length

    def call(self, x):
        return self.tokens(x) + self.positions(ops.arange(ops.shape(x)[-1]))

    def compute_mask(self, x, mask=None):
        return ops.not_equal(x, 0)


class TransformerBlock(L.Layer):
    def __init__(self, dim, heads, causal=False):
        super().__init__()
        self.attention, self.causal = L.MultiHeadAttention(heads, dim // heads), causal
        self.feed_forward = keras.Sequential([L.Dense(2 * dim, "relu"), L.Dense(dim)])
        self.norms = [L.LayerNormalization(), L.LayerNormalization()]
        self.supports_masking = True

    def call(self, x, training=None):
        x = self.norms[0](x + self.attention(x, x, use_causal_mask=self.causal))
        return self.norms[1](x + self.feed_forward(x))


@kind
def text_transformer():
    build = lambda x: L.Dense(2)(L.GlobalAveragePooling1D()(TransformerBlock(8, 2)(TokenAndPosition(12, 30, 8)(x))))
    x = integers(30, 3, 12)
    x[:, 8:] = 0
    return functional((12,), build, "int32"), x


@kind
def causal_language_model():
    build = lambda x: L.Dense(30)(TransformerBlock(8, 2, True)(TokenAndPosition(12, 30, 8)(x)))
    return functional((12,), build, "int32"), integers(30, 3, 12)


@kind
def bidirectional_text():
    stack = [L.Embedding(30, 8, mask_zero=True), L.Bidirectional(L.LSTM(6, return_sequences=True)), L.Bidirectional(L.LSTM(6)), L.Dense(1)]
    x = integers(30, 3, 10)
    x[:, 6:] = 0
    return keras.Sequential([keras.Input((None,), dtype="int32"), *stack]), x


@kind
def recurrent_forecast():
    return functional((10, 4), lambda x: L.Dense(2)(L.GRU(5, reset_after=False)(L.GRU(6, return_sequences=True)(x)))), floats(3, 10, 4)


@kind
def sequence_to_sequence():
    first, second = keras.Input((7, 5)), keras.Input((6, 4))
    _, *states = L.LSTM(8, return_state=True)(first)
    outputs = L.LSTM(8, return_sequences=True)(second, initial_state=states)
    return keras.Model([first, second], L.Dense(4, "softmax")(outputs)), [floats(3, 7, 5), floats(3, 6, 4)]


@kind
def siamese():
    tower = keras.Sequential([keras.Input((12, 12, 1)), L.Conv2D(4, 3, activation="tanh"), L.AveragePooling2D(2), L.Flatten(), L.Dense(5)])
    first, second = keras.Input((12, 12, 1)), keras.Input((12, 12, 1))
    distance = L.Lambda(lambda v: ops.sqrt(ops.maximum(ops.sum(ops.square(v[0] - v[1]), 1, keepdims=True), 1e-7)))
    outputs = L.Dense(1, "sigmoid")(distance([tower(first), tower(second)]))
    return keras.Model([first, second], outputs), [floats(3, 12, 12, 1), floats(3, 12, 12, 1)]


@kind
def autoencoder():
    def build(x):
        x = L.MaxPooling2D()(L.Conv2D(4, 3, padding="same", activation="relu")(x))
        x = L.Conv2DTranspose(4, 3, 2, "same", activation="relu")(x)
        return L.Conv2D(1, 3, padding="same", activation="sigmoid")(x)

    return functional((12, 12, 1), build), floats(3, 12, 12, 1)


@kind
def segmentation():
    def build(x):
        down = L.Conv2D(4, 3, 2, "same", activation="relu")(x)
        deep = L.LeakyReLU(0.1)(L.Conv2D(8, 3, 2, "same")(down))
        up = L.concatenate([L.UpSampling2D(2, interpolation="bilinear")(deep), down])
        return L.Conv2D(3, 1, activation="softmax")(L.UpSampling2D()(L.DepthwiseConv2D(3, padding="same")(up)))

    return functional((16, 16, 3), build), floats(2, 16, 16, 3)


@kind
def super_resolution():
    def build(x):
        batch, height, width, _ = ops.shape(x)
        x = ops.reshape(L.Conv2D(8, 3, padding="same")(x), (-1, height, width, 2, 2, 2))
        return ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, 2 * height, 2 * width, 2))

    return functional((6, 6, 1), build), floats(2, 6, 6, 1)


@kind
def wide_and_deep():
    inputs = {"age": keras.Input((1,), name="age"), "job": keras.Input((1,), dtype="int32", name="job")}
    embedded = L.Flatten()(L.Embedding(6, 4)(inputs["job"]))
    wide = L.concatenate([inputs["age"], L.Flatten()(L.CategoryEncoding(6, "one_hot")(inputs["job"]))])
    deep = L.BatchNormalization()(L.Dense(8, "relu")(L.concatenate([inputs["age"], embedded])))
    return keras.Model(inputs, L.Dense(1, "sigmoid")(L.concatenate([wide, deep]))), {"age": floats(4, 1), "job": integers(6, 4, 1)}


@kind
def normalized_features():
    norm = L.Normalization()
    norm.adapt(3 + 2 * floats(50, 6))
    return functional((6,), lambda x: L.Dense(1)(L.Dense(8, "selu")(norm(x)))), floats(4, 6)


class GatedResidual(L.Layer):
    def __init__(self, units):
        super().__init__()
        self.first, self.second, self.gate = L.Dense(units, "elu"), L.Dense(units), L.Dense(units, "sigmoid")
        self.norm = L.LayerNormalization()

    def call(self, x):
        y = self.second(self.first(x))
        return self.norm(x + self.gate(y) * y)


class Selection(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = {"wide": GatedResidual(6), "narrow": GatedResidual(6)}
        self.head = L.Dense(2)

    def call(self, inputs, training=None):
        weights = ops.softmax(self.head(inputs))
        parts = ops.stack([self.blocks[name](inputs) for name in ("wide", "narrow")], axis=1)
        return ops.squeeze(ops.matmul(ops.expand_dims(weights, 1), parts), 1)


@kind
def subclassed_selection():
    model, x = Selection(), floats(4, 6)
    model(x)
    return model, x


@kind
def temporal_convolutions():
    def build(x):
        for rate in (1, 2, 4):
            y = L.Activation("swish")(L.Conv1D(6, 2, padding="causal", dilation_rate=rate)(x))
            x = L.SpatialDropout1D(0.1)(y) + L.Conv1D(6, 1)(x)
        return L.Dense(1)(x[:, -1])

    return functional((16, 3), build), floats(3, 16, 3)


@kind
def attention_pooling():
    def build(x):
        scores = L.Softmax(axis=1)(L.Dense(1)(L.Dense(8, "tanh")(x)))
        return L.Dense(2)(ops.sum(scores * x, axis=1))

    return functional((9, 5), build), floats(3, 9, 5)


@kind
def video_frames():
    build = lambda x: L.Dense(2)(L.GRU(4)(L.TimeDistributed(keras.Sequential([L.Conv2D(3, 3), L.GlobalMaxPooling2D()]))(x)))
    return functional((4, 8, 8, 2), build), floats(2, 4, 8, 8, 2)


@kind
def next_frame():
    build = lambda x: L.Conv3D(1, 3, padding="same")(L.ConvLSTM2D(3, 3, padding="same", return_sequences=True)(x))
    return functional((3, 6, 6, 1), build), floats(2, 3, 6, 6, 1)


@kind
def grouped_queries():
    build = lambda x: L.GroupQueryAttention(4, 4, 2)(L.RMSNormalization()(x), x, use_causal_mask=True)
    return functional((7, 8), build), floats(2, 7, 8)


@kind
def shared_and_tied():
    class Tied(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding = L.Embedding(20, 6)
            self.mix = L.Dense(6, "relu")

        def call(self, tokens):
            x = self.mix(self.mix(self.embedding(tokens)))
            return ops.matmul(x, ops.transpose(self.embedding.embeddings))

    model, x = Tied(), integers(20, 2, 5)
    model(x)
    return model, x


@kind
def graph_network():
    nodes, edges = keras.Input((6, 4)), keras.Input((6, 6))

    def build(x, a):
        a = a / (ops.sum(a, -1, keepdims=True) + 1)
        for _ in range(2):
            x = ops.relu(L.Dense(5)(ops.einsum("bij,bjf->bif", a, x)))
        return L.Dense(2)(ops.mean(x, 1))

    return keras.Model([nodes, edges], build(nodes, edges)), [floats(2, 6, 4), np.abs(floats(2, 6, 6))]
