"""What this processor can do at most: the two limits of a roofline, measured with the vectors of `keras_mml.vector_kernels`."""

import statistics
import time

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from keras_mml import vector_kernels as vk

LANES = vk.vector_of(vk.word, vk.ISA.lanes)
WIDTH = 4 * vk.ISA.lanes  # bytes


def running_sums(builder, count, data, repeats, add):
    "Keep `count` vectors of sums in registers, add to each in every repeat, and store them over `data` at the end."
    sums = [cgutils.alloca_once_value(builder, vk.constant(LANES, i)) for i in range(count)]
    with cgutils.for_range(builder, repeats, intp=vk.address) as loop:
        for i, total in enumerate(sums):
            builder.store(add(loop.index, i, builder.load(total)), total)
    for i, total in enumerate(sums):
        builder.store(builder.load(total), vk.pointer(builder, data, WIDTH * i, LANES), align=1)


@intrinsic
def only_dot(typing, data, repeats):
    "The step of the sum on as many registers as a tile has, with nothing to load or to take apart."

    def codegen(context, builder, signature, args):
        codes, four = ([vk.load(builder, args[0], 256 * i + 64 * g, LANES) for g in range(4)] for i in range(2))

        def step(index, i, total):  # the codes change with the repeat, or the compiler would multiply only once
            turn = vk.broadcast(builder, builder.and_(builder.trunc(index, vk.word), vk.word(0x01010101)), LANES)
            return vk.ISA.dot(builder, total, [builder.xor(c, turn) for c in codes], four)

        running_sums(builder, vk.ISA.rows * vk.ISA.vectors, *args, step)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def only_load(typing, data, blocks):
    "Load blocks of 256 bytes in turn, fetched ahead as the kernel does, and add them up."

    def codegen(context, builder, signature, args):
        def step(index, i, total):
            block = builder.add(args[0], builder.mul(index, vk.address(256)))
            ahead = vk.pointer(builder, block, vk.PREFETCH + WIDTH * i, vk.byte)
            vk.call(builder, "llvm.prefetch.p0", ir.VoidType(), ahead, vk.word(0), vk.word(3), vk.word(1))
            return builder.add(total, vk.load(builder, block, WIDTH * i, LANES))

        running_sums(builder, 256 // WIDTH, *args, step)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@numba.njit
def run_dot(data, repeats):
    only_dot(data.ctypes.data, repeats)


@numba.njit
def run_load(data):
    only_load(data.ctypes.data, data.size // 256)


def seconds(function, *args, least=20):
    "Median time of a call."
    function(*args)
    times = []
    for _ in range(least):
        start = time.perf_counter()
        function(*args)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def arithmetic(repeats=20_000):
    "Multiply-adds a second that one thread can do."
    sums = vk.ISA.rows * vk.ISA.vectors * vk.ISA.lanes
    return repeats * sums * 16 / seconds(run_dot, np.ones(4096, np.uint8), repeats)


def reading(size):
    "Bytes a second that one thread can read of an array of `size` bytes."
    return size / seconds(run_load, np.ones(size, np.uint8))
