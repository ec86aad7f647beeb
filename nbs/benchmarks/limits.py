"""What this processor can do at most: the two limits of a roofline, measured in C (limits.c)."""

import ctypes
import functools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from keras_mml.native.build import compile_c


@functools.cache
def library():
    "limits.c, compiled for this processor."
    path = Path(tempfile.mkdtemp(), "limits.so")
    compile_c([Path(__file__).with_suffix(".c")], path, flags=["-march=native", "-fvisibility=default"])
    loaded = ctypes.CDLL(str(path))
    loaded.only_dot.restype = ctypes.c_int64
    return loaded


def seconds(function, least=20):
    "Median time of a call."
    function()
    times = []
    for _ in range(least):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def arithmetic(repeats=100_000):
    "Multiply-adds a second that one thread can do."
    result = ctypes.byref(ctypes.c_uint32())
    run = lambda: library().only_dot(ctypes.c_int64(repeats), result)
    return run() / seconds(run)


def reading(size):
    "Bytes a second that one thread can read of an array of `size` bytes."
    data, result = np.ones(size, np.uint8), ctypes.byref(ctypes.c_uint32())
    return size / seconds(lambda: library().only_load(ctypes.c_void_p(data.ctypes.data), ctypes.c_int64(size), result))
