"""Saving loses nothing: training that stops, is saved, is loaded and goes on ends exactly where uninterrupted training ends."""

import keras
import numpy as np

from keras_mml.layers import DenseMML, RMSNorm


def network(**arguments):
    model = keras.Sequential(
        [keras.Input((12,)), DenseMML(16, activation="relu", **arguments), RMSNorm(use_bias=True), DenseMML(3, **arguments)]
    )
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse")
    return model


def one_epoch(model, seed):
    # Shuffled here: with jax, Keras' own shuffling does not follow `set_random_seed` (nor does it for Dense).
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(96, 12)).astype("float32"), rng.normal(size=(96, 3)).astype("float32")
    order = np.random.default_rng(seed).permutation(len(x))
    model.fit(x[order], y[order], batch_size=16, epochs=1, shuffle=False, verbose=0)


def test_weights_alone_can_be_saved_and_loaded(tmp_path):
    keras.utils.set_random_seed(7)
    model = network()
    one_epoch(model, seed=1)
    model.save_weights(tmp_path / "model.weights.h5")
    other = network()
    other.load_weights(tmp_path / "model.weights.h5")
    for ours, theirs in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(*(keras.ops.convert_to_numpy(w) for w in (ours, theirs)))


def test_ten_layers_still_get_gradients():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((20,)), *[DenseMML(32, activation="relu") for _ in range(10)], keras.layers.Dense(2)])
    model.compile(optimizer="adam", loss="mse")
    before = [keras.ops.convert_to_numpy(layer.kernel) for layer in model.layers]
    rng = np.random.default_rng(0)
    model.train_on_batch(rng.normal(size=(64, 20)).astype("float32"), rng.normal(size=(64, 2)).astype("float32"))
    for kernel, layer in zip(before, model.layers, strict=True):
        moved = keras.ops.convert_to_numpy(layer.kernel) != kernel
        assert moved.mean() > 0.3, layer.name
