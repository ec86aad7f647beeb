"""The backend is chosen by KERAS_BACKEND, torch unless set; everything else is Keras' default."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from hypothesis import settings

settings.register_profile("keras_mml", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("keras_mml")

collect_ignore = ["distributed.py"]  # a script that test_distribution.py starts
