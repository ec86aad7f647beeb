"""The kernels: exact integers for every shape, instruction set, thread count and process; the same floats as NumPy."""

import ctypes
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mml.native import build, kernels
from keras_mml.native.kernels import linear_numpy, product_numpy, ternary_linear
from keras_mml.packing import pack_ternary, packed_shape, unpack_ternary

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.any_backend  # the kernels know none
native = kernels.native()
needs_native = pytest.mark.skipif(native is None, reason="the C library is missing")
sizes = st.integers(1, 300) | st.sampled_from([15, 16, 17, 63, 64, 65, 128, 1000])


def problem(rows, dim, units, seed=0, limit=127):
    "Whole numbers that rounding keeps as they are, and trits."
    rng = np.random.default_rng(seed)
    q = rng.integers(-limit, limit + 1, (rows, dim))
    q[:, 0] = limit * rng.choice([-1, 1], rows)  # the largest of its row, so that the scale is 1
    return q, rng.integers(-1, 2, (dim, units))


def sums(q, trits, bits=8):
    return ternary_linear(q.astype("float32"), pack_ternary(trits), trits.shape[1], 1.0, normalize=False, bits=bits)


@given(sizes, st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(2, 8))
def test_sums_are_exact(dim, units, rows, seed, bits):
    q, trits = problem(rows, dim, units, seed, 2 ** (bits - 1) - 1)
    np.testing.assert_array_equal(sums(q, trits, bits), q @ trits)
    np.testing.assert_array_equal(product_numpy(q.astype(np.int8), pack_ternary(trits), units), q @ trits)


@given(sizes, st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_integers_are_taken_as_they_are(dim, units, rows, seed):
    "`bits=0`: nothing is normalised, and no row is scaled up to the largest integer."
    rng = np.random.default_rng(seed)
    q, trits = rng.integers(-127, 128, (rows, dim)) // 2 ** rng.integers(0, 8, (rows, 1)), rng.integers(-1, 2, (dim, units))
    np.testing.assert_array_equal(sums(q, trits, bits=0), q @ trits)
    scale, bias = rng.normal(size=(2, units)).astype("float32")
    expected = linear_numpy(q.astype("float32"), pack_ternary(trits), units, scale, bias, None, False, 0)
    np.testing.assert_array_equal(ternary_linear(q, pack_ternary(trits), units, scale, bias, normalize=False, bits=0), expected)


@pytest.fixture
def threads():
    "`threads(n)`: as many share each product, however small."
    yield lambda count: native.share(count, 0)
    kernels.set_num_threads(kernels.get_num_threads())


@needs_native
@pytest.mark.parametrize("count", [1, 2, 3, 64])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_sums_are_exact_with_threads(count, rows, threads):
    threads(count)
    for dim, units in [(1, 1), (100, 70), (333, 500)]:
        q, trits = problem(rows, dim, units)
        np.testing.assert_array_equal(sums(q, trits), q @ trits)


@pytest.mark.parametrize("dim", [2**19, 2**19 + 16, 2**23])  # up to the limit of sums in place, beyond it, and up to that of all
@pytest.mark.parametrize("rows", [1, 7])
def test_the_largest_sums_do_not_overflow(dim, rows):
    for q in (127, -127):
        for trit in (1, -1):
            y = sums(np.full((rows, dim), q), np.full((dim, 3), trit))
            np.testing.assert_array_equal(y, np.float32(q * trit * dim))


@needs_native
@given(sizes, st.integers(1, 200), st.integers(1, 20), st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), st.integers(2, 8))
def test_the_kernel_gives_the_floats_of_numpy(dim, units, rows, seed, normalize, vectors, bits):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(rows, dim)) * 10.0 ** rng.integers(-12, 12, (rows, 1))).astype("float32")
    x[rng.random(rows) < 0.2] = 0
    packed = pack_ternary(rng.integers(-1, 2, (dim, units)))
    scale, bias, gain = (rng.normal(size=n).astype("float32") for n in (units, units, dim))
    bias, gain = (bias, gain) if vectors else (None, None)
    expected = linear_numpy(x, packed, units, scale, bias, gain, normalize, bits)
    np.testing.assert_array_equal(ternary_linear(x, packed, units, scale, bias, gain, normalize, bits), expected)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rows", [5, 50])
def test_rows_that_are_not_numbers_stay_alone(normalize, rows):
    rng = np.random.default_rng(0)
    x, packed = rng.normal(size=(rows, 100)).astype("float32"), pack_ternary(rng.integers(-1, 2, (100, 70)))
    bias = np.arange(70, dtype="float32")
    clean = ternary_linear(x, packed, 70, 1.0, bias, normalize=normalize)
    x[0, 3], x[1, 99], x[2, 0], x[3] = np.nan, np.inf, -np.inf, 0
    y = ternary_linear(x, packed, 70, 1.0, bias, normalize=normalize)
    assert np.isnan(y[:3]).all()
    np.testing.assert_array_equal(y[3], bias)
    np.testing.assert_array_equal(y[4:], clean[4:])


def test_inputs_of_any_memory_order_and_dtype():
    q, trits = problem(12, 90, 30)
    every, expected = np.zeros((24, 270)), q @ trits
    every[::2, ::3] = q
    packed = pack_ternary(trits)
    inputs = [every[::2, ::3], np.asfortranarray(q.astype("float32")), q.astype("float64"), q.astype("int32"), q.astype("float16")]
    for x in inputs + [every[::2, ::3].astype("float32")[::-1][::-1]]:
        np.testing.assert_array_equal(ternary_linear(x, packed, 30, 1.0, normalize=False), expected)
    shaped = ternary_linear(q.reshape(2, 3, 2, 90), packed, 30, 1.0, normalize=False)
    np.testing.assert_array_equal(shaped, expected.reshape(2, 3, 2, 30))
    assert ternary_linear(np.zeros((0, 90)), packed, 30, 1.0).shape == (0, 30)
    memory = np.empty(packed.size + 1, np.uint8)
    memory[1:] = packed.ravel()  # an odd address
    unaligned = memory[1:].reshape(packed.shape)
    np.testing.assert_array_equal(ternary_linear(q, unaligned, 30, 1.0, normalize=False), expected)


@pytest.mark.parametrize("count", [1, 4])
def test_many_python_threads_at_once(count, threads):
    threads(count)
    problems = [problem(rows, 200, 130, rows) for rows in range(1, 33)] * 6
    with ThreadPoolExecutor(8) as pool:
        for (q, trits), y in zip(problems, pool.map(lambda p: sums(*p), problems), strict=True):
            np.testing.assert_array_equal(y, q @ trits)


def run_python(code, **environment):
    "Run code in a process of its own, with this folder to import from; what it prints."
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **environment}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


CHECK = """
import numpy as np
from test_kernels import problem, sums
def check():
    for dim, units, rows in [(1, 1, 1), (16, 64, 1), (100, 70, 1), (100, 70, 3), (129, 200, 7), (300, 65, 70)]:
        q, trits = problem(rows, dim, units)
        np.testing.assert_array_equal(sums(q, trits), q @ trits)
        np.testing.assert_array_equal(sums(q // 3, trits, bits=0), q // 3 @ trits)
"""


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_computes_the_same_with_threads_of_its_own():
    code = CHECK + """
import os, threading
from keras_mml.native import kernels
kernels.native().share(3, 0)
check()
others = [threading.Thread(target=lambda: [check() for _ in range(20)], daemon=True) for _ in range(3)]
for other in others:  # who may have the threads when the child is made
    other.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        try:
            check()
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
print("equal")
"""
    assert run_python(code) == "equal"


SETS = [name for name in ("avx512_vnni", "avx_vnni", "avx2", "neon_dot", "generic") if native and native.use(name)] or ["generic"]


@needs_native
@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_that_this_processor_has(name):
    best = SETS[0]
    assert native.use(name) and native.instructions() == name
    try:
        for dim, units, rows in [(1, 1, 1), (16, 64, 1), (100, 70, 1), (100, 70, 3), (129, 200, 7), (300, 65, 70)]:
            q, trits = problem(rows, dim, units)
            np.testing.assert_array_equal(sums(q, trits), q @ trits)
            np.testing.assert_array_equal(sums(q // 3, trits, bits=0), q // 3 @ trits)
        rng = np.random.default_rng(0)
        x, packed = rng.normal(size=(9, 100)).astype("float32"), pack_ternary(rng.integers(-1, 2, (100, 70)))
        scale, gain = rng.normal(size=70).astype("float32"), rng.normal(size=100).astype("float32")
        expected = linear_numpy(x, packed, 70, scale, scale, gain, True, 8)
        np.testing.assert_array_equal(ternary_linear(x, packed, 70, scale, scale, gain), expected)
    finally:
        assert native.use(best)


@pytest.mark.skipif(SETS[0] != "avx512_vnni", reason="AVX-VNNI is imitated with AVX-512 VNNI, which this processor does not have")
def test_avx_vnni_imitated(tmp_path):
    "Few processors have it, and QEMU has not: its kernel, with the instruction of AVX-512 for registers of the same size."
    source = ROOT / "keras_mml" / "native"
    code = (source / "kernels.c").read_text()
    for theirs, ours in [("avx2,avxvnni", "avx2,avx512vl,avx512vnni"), ("dpbusd_avx_epi32", "dpbusd_epi32"), ("a71 >> 4 & 1", "avx512")]:
        assert theirs in code
        code = code.replace(theirs, ours)
    (tmp_path / "kernels.c").write_text(code)
    flags = ["-fvisibility=default", f"-I{source}"]
    build.compile_c([tmp_path / "kernels.c", source / "chain.c", source / "threads.c"], tmp_path / "imitated.so", flags=flags)
    library = ctypes.CDLL(str(tmp_path / "imitated.so"))
    library.keras_mml_use.restype = ctypes.c_char_p
    assert library.keras_mml_use(b"avx_vnni") == b"avx_vnni"
    for dim, units, rows in [(1, 1, 1), (16, 64, 1), (100, 70, 1), (100, 70, 3), (129, 200, 7), (300, 65, 70)]:
        q, trits = problem(rows, dim, units)
        x, packed, scale, outputs = q.astype("float32"), pack_ternary(trits), np.ones(units, "float32"), np.empty((rows, units), "float32")
        table = np.array([0, dim, units, packed.ctypes.data, scale.ctypes.data, 0, 0, 0, 0], np.int64)
        at = [ctypes.c_void_p(array.ctypes.data) for array in (table, x, outputs)]
        assert library.keras_mml_run(at[0], ctypes.c_int64(1), at[1], ctypes.c_int64(rows), at[2])
        np.testing.assert_array_equal(outputs, q @ trits)


@needs_native
def test_an_instruction_set_that_is_not_there_is_not_used():
    before = native.instructions()
    assert not native.use("abacus") and native.instructions() == before


@needs_native
def test_what_does_not_fit_is_not_computed():
    q, trits = problem(3, 20, 5)
    packed, scale = pack_ternary(trits), np.ones(5, np.float32)
    table = np.array([[0, 20, 5, packed.ctypes.data, scale.ctypes.data, 0, 0, 0, 127]], np.int64)
    x, outputs = q.astype("float32"), np.full((3, 5), 7, np.float32)
    read_only = outputs.copy()
    read_only.flags.writeable = False
    for arguments in [
        (table, x.astype("float64"), outputs), (table, x[:, :19].copy(), outputs), (table, x, outputs[:2]), (table[:0], x, outputs),
        (table, np.asfortranarray(x), outputs), (table, x, read_only), (table.astype("int32"), x, outputs), (table, None, outputs),
        (table, x), (table, x.reshape(3, 4, 5), outputs), (table, x.ravel(), outputs), (table, np.float32(1), outputs),
    ]:  # fmt: skip
        assert not native.run((20,), *arguments)
    assert not native.run((4, 5), table, x, outputs) and not native.run((), table, x, outputs)
    for shape in (None, (None,), [20]):
        with pytest.raises((TypeError, SystemError)):
            native.run(shape, table, x, outputs)
    assert (outputs == 7).all() and native.run((20,), table, x, outputs)
    np.testing.assert_array_equal(outputs, q @ trits)


def test_threads_respect_their_limits(monkeypatch):
    before = kernels.get_num_threads()
    try:
        kernels.set_num_threads(3)
        assert kernels.get_num_threads() == 3
        for wrong in (0, -1, 1.5, None):
            with pytest.raises(ValueError, match=f"must be a positive integer. Received: threads={wrong}"):
                kernels.set_num_threads(wrong)
    finally:
        kernels.set_num_threads(before)
    code = "from keras_mml.native import kernels; print(kernels.get_num_threads())"
    assert run_python(code, OMP_NUM_THREADS="1") == run_python(code, OMP_NUM_THREADS="1,2") == "1"
    assert int(run_python(code, OMP_NUM_THREADS="")) == len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else True


def test_the_threads_of_torch_stay_as_they_were():
    code = """
        import torch, numpy as np
        before = torch.get_num_threads()
        from keras_mml.native import kernels
        from keras_mml.packing import pack_ternary
        kernels.ternary_linear(np.ones((8, 1024), "float32"), pack_ternary(np.ones((1024, 1024))), 1024, 1.0)
        print(torch.get_num_threads() == before)
    """
    assert run_python(code) == "True"


def test_without_the_library_the_results_are_the_same_with_one_warning():
    code = """
        import sys, warnings
        sys.modules["keras_mml.native._native"] = None
        import numpy as np
        rng = np.random.default_rng(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from keras_mml.native.kernels import ternary_linear
            from keras_mml.packing import pack_ternary
            x, packed = rng.normal(size=(5, 100)).astype("float32"), pack_ternary(rng.integers(-1, 2, (100, 70)))
            for _ in range(3):
                y = ternary_linear(x, packed, 70, 0.1)
        assert ["without compiled kernels" in str(w.message) for w in caught if w.category is RuntimeWarning] == [True]
        print(y.tobytes().hex())
    """
    rng = np.random.default_rng(0)
    x, packed = rng.normal(size=(5, 100)).astype("float32"), pack_ternary(rng.integers(-1, 2, (100, 70)))
    assert run_python(code) == ternary_linear(x, packed, 70, 0.1).tobytes().hex()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(packed=np.zeros((2, 7, 256), np.int8)), r"packed weights of shape \(2, 7, 256\) and dtype uint8. Received: shape .* int8"),
        (dict(packed=np.zeros((1, 7, 256), np.uint8)), r"Received: shape \(1, 7, 256\)"),
        (dict(units=200), r"packed weights of shape \(4, 7, 256\)"),
        (dict(scale=np.ones(3)), r"`scale` must have shape \(70,\). Received: shape \(3,\)"),
        (dict(bias=np.ones(100)), "`bias` must have shape"),
        (dict(gain=np.ones(70)), "`gain` must have shape"),
        (dict(bits=1), "expected an integer from 2 to 8, or 0. Received: bits=1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    arguments = dict(x=np.ones((2, 100)), packed=np.zeros((2, 7, 256), np.uint8), units=70, scale=1.0)
    with pytest.raises(ValueError, match=message):
        ternary_linear(**{**arguments, **changes})


shapes = st.lists(st.integers(0, 20), max_size=4).map(tuple) | st.tuples(st.integers(1, 70), st.integers(1, 200))


@given(shapes, st.sampled_from([2, 1.6]), st.integers(0, 2**32 - 1))
def test_packing_comes_back_exactly(shape, bits, seed):
    trits = np.random.default_rng(seed).integers(-1, 2, shape)
    packed = pack_ternary(trits.astype(np.float32), bits)
    assert packed.dtype == np.uint8
    again = unpack_ternary(packed, shape, bits)
    assert again.shape == shape and again.dtype == np.int8
    np.testing.assert_array_equal(again, trits)


def test_packed_sizes():
    assert pack_ternary(np.zeros((784, 256))).shape == packed_shape(784, 256) == (4, 49, 256)
    assert pack_ternary(np.zeros((784, 256)), bits=1.6).shape == (-(-784 * 256 // 5),)


@pytest.mark.parametrize("bits", [2, 1.6])
def test_damaged_or_foreign_bytes_are_refused(bits):
    packed = pack_ternary(np.zeros((64, 64)), bits)
    damaged = packed.copy()
    damaged.flat[5] = 255
    for wrong in (damaged, packed.ravel()[:-1], packed.astype(np.int16)):
        with pytest.raises(ValueError):
            unpack_ternary(wrong, (64, 64), bits)
    with pytest.raises(ValueError, match="Only the values -1, 0 and 1"):
        pack_ternary(np.array([0, 2]), bits)
    with pytest.raises(ValueError, match="expected 2 or 1.6. Received: bits=3"):
        pack_ternary(np.zeros(4), 3)
