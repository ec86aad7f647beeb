"""The backend is chosen by KERAS_BACKEND, torch unless set; everything else is Keras' default."""

import importlib.util
import os

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest
from hypothesis import settings

from keras_mml.testing import SHORT

BACKEND = keras.backend.backend()

settings.register_profile("keras_mml", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("keras_mml")


def pytest_collection_modifyitems(items):
    for item in items:
        if SHORT and (item.get_closest_marker("slow") or BACKEND != "torch" and item.get_closest_marker("slow_to_compile")):
            item.add_marker(pytest.mark.skip(reason="Too long for a short run; `make test-all` runs it."))
        if item.get_closest_marker("with_tensorflow") and importlib.util.find_spec("tensorflow") is None:
            item.add_marker(pytest.mark.skip(reason="needs TensorFlow"))


@pytest.fixture(autouse=True)
def seeds():
    "Each run has the same weights and data, whatever this process ran before: one rounding that falls the other way shows in outputs."
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def one_thread_of_torch():
    "Tests run side by side, and torch's threads that share cores wait for each other most of the time."
    if BACKEND == "torch":
        import torch

        torch.set_num_threads(1)


collect_ignore = ["distributed.py", "installed.py"]  # scripts: test_distribution.py starts one; the other is for wheels, elsewhere
