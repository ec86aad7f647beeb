"""A wheel where it belongs: in an environment with NumPy and nothing else, its compiled kernels compute what NumPy does.

    pip install numpy && pip install --no-deps keras_mml-*.whl && python installed.py
    python installed.py --without    also where nothing could be compiled: one warning, and the same results
    python installed.py --layers N   the sums of N random layers are those of int64, on each instruction set of this processor
"""

import sys
import sysconfig
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import keras_mml.runtime  # noqa: F401
    from keras_mml.native import chain, kernels
    from keras_mml.packing import pack_ternary

    native = kernels.native()

rng = np.random.default_rng(0)


def layer(dim, units):
    "A random layer: all that `ternary_linear` is given after its inputs."
    packed = pack_ternary(rng.integers(-1, 2, (dim, units)))
    scale, bias, gain = (rng.normal(size=n).astype("float32") for n in (units, units, dim))
    bits, normalize = int(rng.choice([0, 2, 3, 4, 5, 6, 7, 8])), bool(rng.random() < 0.5)
    bias, gain = (v if rng.random() < 0.5 else None for v in (bias, gain))
    return packed, units, scale, bias, gain, normalize and bits > 0, bits


def check_a_layer():
    rows, dim, units = (int(rng.choice(sizes)) for sizes in ((1, 2, 7, 33), (1, 15, 16, 100, 333, 1000), (1, 63, 64, 70, 200)))
    x, settings = rng.integers(-127, 128, (rows, dim)).astype("float32"), layer(dim, units)
    np.testing.assert_array_equal(kernels.ternary_linear(x, *settings), kernels.linear_numpy(x, *settings))


def check_sums(layers):
    "Of whole numbers, in int64."
    sets = [name for name in ("avx512_vnni", "avx_vnni", "avx2", "neon_dot", "generic") if native.use(name)]
    for done in range(layers):
        native.use(sets[done % len(sets)])
        rows, dim, units = (int(n) for n in rng.integers(1, (10, 600, 200)))
        x, trits = rng.integers(-127, 128, (rows, dim)), rng.integers(-1, 2, (dim, units))
        sums = kernels.ternary_linear(x, pack_ternary(trits), units, 1.0, normalize=False, bits=0)
        assert (sums == x @ trits).all(), (sets[done % len(sets)], rows, dim, units)
    print(f"{layers:,} layers, {', '.join(sets)}: all sums are those of int64")


def check_many_callers():
    "They compute at the same time, which a free-threaded Python does not prevent."
    x, settings = rng.normal(size=(20, 300)).astype("float32"), layer(300, 1000)
    expected = kernels.linear_numpy(x, *settings)
    with ThreadPoolExecutor(8) as pool:
        for outputs in pool.map(lambda _: kernels.ternary_linear(x, *settings), range(200)):
            np.testing.assert_array_equal(outputs, expected)


def check_a_chain():
    x, outputs, steps = rng.normal(size=(9, 100)).astype("float32"), None, []
    for dim, units in ((100, 200), (200, 70), (70, 10)):
        packed, _, scale, bias, gain, normalize, _ = layer(dim, units)
        steps.append(chain.Step(dim, units, packed, scale, bias, gain, normalize, activation="relu"))
        outputs = np.maximum(kernels.linear_numpy(x if outputs is None else outputs, packed, units, scale, bias, gain, normalize, 8), 0)
    np.testing.assert_array_equal(chain.Chain(steps, (100,))(x), outputs)


if "--layers" in sys.argv:
    check_sums(int(sys.argv[sys.argv.index("--layers") + 1]))
    sys.exit()
for _ in range(300):
    check_a_layer()
check_many_callers()
said = [str(w.message) for w in caught if w.category is RuntimeWarning]
if "--without" in sys.argv:
    assert native is None and len(said) == 1 and "without compiled kernels" in said[0], said
else:
    assert native is not None and not said, said
    native.share(3, 0)  # threads for everything
    for _ in range(100):
        check_a_layer()
    check_many_callers()
    check_a_chain()
assert "keras" not in sys.modules
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
assert not (free_threaded and sys._is_gil_enabled())  # a module that does not say it can do without the lock brings it back
print(f"Python {sys.version.split()[0]}{' without a lock' * free_threaded}, {sys.platform}: {native.instructions() if native else 'NumPy'}")
