"""Other processors, which QEMU imitates: the same layers give the same bits as NumPy on each of them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keras_mml.constants import NORM_EPSILON, SCALE_EPSILON, largest_integer
from keras_mml.native.build import FLAGS
from keras_mml.native.kernels import linear_numpy, quantize_rows
from keras_mml.packing import pack_ternary

ROOT = Path(__file__).resolve().parent.parent


def has_qemu():
    "Whether QEMU is there, and new enough to know AVX2."
    if not all(map(shutil.which, ("qemu-aarch64", "qemu-x86_64"))):
        return False
    version = subprocess.run(["qemu-x86_64", "--version"], capture_output=True, text=True).stdout
    return tuple(map(int, re.search(r"(\d+)\.(\d+)", version).groups())) >= (7, 2)


pytestmark = [
    pytest.mark.any_backend,  # C and NumPy
    pytest.mark.skipif(not has_qemu(), reason="needs QEMU 7.2 or newer: apt-get install qemu-user"),
]


def backward_numpy(gradient, x, gain):
    "The gradients of a normalisation's inputs and gain, rounded in the order of the C library."
    gain, wide = (np.float32(1) if gain is None else gain), np.float64
    mean_square = np.mean(np.square(x, dtype=wide), axis=-1, keepdims=True).astype(np.float32)
    per_rms = np.float32(1) / np.sqrt(mean_square + np.float32(NORM_EPSILON))
    along = np.mean(gradient.astype(wide) * x * gain, axis=-1, keepdims=True).astype(np.float32) * per_rms * per_rms * per_rms
    dgain = np.zeros(x.shape[1], np.float32)
    for row in gradient * x * per_rms:
        dgain += row
    return gradient * gain * per_rms - x * along, dgain


def layer(rng, rows, dim, units, bits=8, normalize=False, vectors=False, each_output=False, extreme=False):
    "A layer for `machine.c` as bytes: its numbers, what it has and is given, and what it shall compute."
    if bits:
        x = rng.normal(size=(rows, dim)) * 10.0 ** rng.integers(-12, 12, (rows, 1))
    else:
        x = rng.integers(-127, 128, (rows, dim))
    x, kernel = x.astype("float32"), rng.normal(size=(dim, units)).astype("float32")
    if extreme:
        values = [np.nan, np.inf, -np.inf, 0, 1e30, 3e38, 1e-40]
        x[np.arange(rows), rng.integers(0, dim, rows)] = np.resize(values, rows)
        x[rows // 2 :: 5] = 0
        kernel[:, ::3] = 0
    bias, gain = (rng.normal(size=n).astype("float32") if vectors else None for n in (units, dim))
    scale = np.abs(kernel).mean(axis=0 if each_output else None, dtype=np.float64).astype("float32")
    scale = np.full(units, np.maximum(scale, np.float32(SCALE_EPSILON)))
    trits = np.clip(np.rint(kernel / scale), -1, 1).astype(np.int8)
    packed = pack_ternary(trits)

    numbers = np.array([rows, dim, units, normalize, largest_integer(bits), each_output, vectors, vectors], np.int64)
    with np.errstate(over="ignore"):
        outputs = linear_numpy(x, packed, units, scale, bias, gain, normalize, bits)
    q, row_scales = quantize_rows(x, gain, normalize, bits)
    rounded = q * row_scales
    expected = [packed, scale, outputs, outputs, rounded, trits * scale]  # `run` and `forward` each have these outputs
    if normalize:
        with np.errstate(all="ignore"):
            dx, dgain = backward_numpy(rounded, x, gain)
        expected += [dx, dgain][: 1 + vectors]
    arrays = [numbers, x, kernel, *((bias, gain) if vectors else ()), *expected]
    assert all(a.dtype == np.float32 for a in arrays if a is not numbers and a is not packed)
    return b"".join(a.tobytes() + bytes(-a.nbytes % 8) for a in arrays)


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    "A file of layers, and how many it holds."
    rng, found = np.random.default_rng(0), []
    sizes = [(1, 1), (15, 63), (16, 64), (17, 65), (33, 5), (100, 70), (129, 200), (333, 129), (1000, 257)]
    for dim, units in sizes:
        for rows in (1, 2, 7, 33):
            for kind in range(4):
                named = dict(zip(("normalize", "vectors", "each_output"), rng.random(3) < 0.5))
                found.append(layer(rng, rows, dim, units, int(rng.integers(2, 9)), extreme=kind == 3, **named))
    for bits in (0, 2, 3, 4, 5, 6, 7, 8):
        found.append(layer(rng, 7, 100, 70, bits, normalize=bits > 0, vectors=True))
        found.append(layer(rng, 1, 4099, 130, bits, vectors=True))
    for rows in (1, 2):
        found.append(layer(rng, rows, 2**19 + 17, 3))  # more inputs than sums in place hold
    file = tmp_path_factory.mktemp("machines") / "layers"
    file.write_bytes(b"".join(found))
    return file, len(found)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    "`program(machine)`: the path of `machine.c`, compiled with the C library for a machine."
    folder = tmp_path_factory.mktemp("programs")
    flags = [f for f in FLAGS if f not in ("-shared", "-fPIC")]
    native = ROOT / "keras_mml" / "native"
    sources = [ROOT / "tests" / "machine.c", *(native / f"{name}.c" for name in ("kernels", "chain", "threads", "training"))]

    def compiled(machine):
        output = folder / machine
        if not output.exists():
            command = [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-musl", "-static", *flags, f"-I{native}"]
            subprocess.run([*command, *map(str, sources), "-o", str(output)], check=True)
        return str(output)

    return compiled


@pytest.mark.parametrize(
    "machine, processor, instructions",
    [
        ("aarch64", "cortex-a53", "generic"),
        ("aarch64", "cortex-a76", "neon_dot"),
        ("x86_64", "Nehalem", "generic"),
        ("x86_64", "Haswell", "avx2"),
    ],
)
def test_the_same_bits_on_other_processors(machine, processor, instructions, program, layers):
    file, count = layers
    command = [f"qemu-{machine}", "-cpu", processor, program(machine), str(file)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert result.stdout == f"{instructions}: {2 * count} layers, 0 numbers differ\n"
