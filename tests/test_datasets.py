"""MNIST comes from the checkout, or from Keras where there is none, and never from a damaged file."""

import shutil

import keras
import numpy as np
import pytest

from keras_mml import datasets

pytestmark = pytest.mark.any_backend  # arrays of NumPy


def test_same_arrays_as_the_file():
    (x_train, y_train), (x_test, y_test) = datasets.load_mnist()
    with np.load(datasets.mnist_file(), allow_pickle=False) as arrays:
        for name, array in dict(x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test).items():
            np.testing.assert_array_equal(array, arrays[name])


def test_keras_downloads_when_the_package_came_without_the_data(monkeypatch):
    monkeypatch.setattr(datasets, "mnist_file", lambda: None)
    monkeypatch.setattr(keras.datasets.mnist, "load_data", lambda: "what Keras loads")
    assert datasets.load_mnist() == "what Keras loads"


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""])
def test_damaged_files_are_refused_and_kept(tmp_path, damage):
    copy = tmp_path / "mnist.npz"
    shutil.copy(datasets.mnist_file(), copy)
    damaged = damage(copy.read_bytes())
    copy.write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged or was changed"):
        datasets.load_mnist(copy)
    assert copy.read_bytes() == damaged
