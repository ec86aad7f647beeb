"""Time packed layers against what else multiplies matrices on a CPU, side by side, and save the medians.

    python nbs/benchmarks/inference.py [--only kernels layers models simulated start peer]

Each part runs in processes of its own and replaces its section of inference.json. In a round every competitor runs in turn, a few
milliseconds of calls at a time after one that is not counted, and the median over the rounds is kept. So weights that fit into a
cache are found there, as in a program that keeps predicting. The peer package has our import name, so it gets an environment of
its own below _build/.
"""

import argparse
import ctypes
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from measure import environment, save

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_suffix(".json")
SHAPES = [(256, 256), (784, 256), (1024, 1024), (4096, 4096), (4096, 11008)]
ROWS = [1, 8, 32, 128, 512]
QUANTIZED_UP_TO = 2**28  # multiply-adds; beyond, a call of Keras' quantized layers, or of llama.cpp's slower types, takes seconds
ORT_BLOCKS = (32, 64, 128)  # with 16 and 256, its accuracy level 4 falls back to floats
GGML_TYPES = {"TQ1_0": (34, 256), "TQ2_0": (35, 256), "Q2_0": (42, 64)}  # numbers in ggml.h, weights that share a scale
GGML_CONTEXTS = []  # to be freed


def medians(functions, seconds=1.0, block=2e-3, least=5, settle=0.0):
    "Median seconds of a call of each function; they take turns until the time is over. A turn first runs for `settle` seconds."
    calls = {}
    for name, function in functions.items():
        function(), function()
        start = time.perf_counter()
        function()
        calls[name] = max(1, int(block / (time.perf_counter() - start)))
    times = {name: [] for name in functions}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times[name]) < least:
        for name, function in functions.items():
            function()
            before = time.perf_counter()
            while time.perf_counter() - before < settle:
                function()
            before = time.perf_counter()
            for _ in range(calls[name]):
                function()
            times[name].append((time.perf_counter() - before) / calls[name])
    return {name: statistics.median(t) for name, t in times.items()}


# ── Single products: float in, float out ────────────────────────────────────────────────────────────────────────────


def ours(trits, x):
    "The compiled kernel on NumPy's memory, and the operator of torch around it."
    import numpy as np
    import torch

    from keras_mml.native import kernels
    from keras_mml.native.operators import packed_linear
    from keras_mml.packing import pack_ternary

    (rows, dim), units = x.shape, trits.shape[1]
    packed, scale, nothing = torch.tensor(pack_ternary(trits)), torch.full((units,), 0.03), torch.empty(0)
    inputs, outputs = x.numpy(), np.empty((rows, units), np.float32)
    table = np.array([0, dim, units, packed.data_ptr(), scale.data_ptr(), 0, 0, False, 127], np.int64)
    run, operator = kernels.native().run, torch.ops.keras_mml.packed_linear.default
    assert run((dim,), table, inputs, outputs)
    assert np.array_equal(outputs, kernels.linear_numpy(inputs, packed.numpy(), units, scale.numpy(), None, None, False, 8))
    return {
        "packed": lambda: run((dim,), table, inputs, outputs),
        "packed, torch operator": lambda: operator(x, packed, scale, nothing, nothing, units, False, 127),
        "packed, normalised, torch operator": lambda: operator(x, packed, scale, nothing, nothing, units, True, 127),
        "packed, normalised, checked": lambda: packed_linear(x, packed, scale, None, None, units),
    }


def prepacked(x, weights):
    "oneDNN with weights in its own order, as torch's compiler uses it."
    import torch

    ordered = torch.ops.mkldnn._reorder_linear_weight(weights, x.shape[0])
    return lambda: torch.ops.mkldnn._linear_pointwise(x, ordered, None, "none", [], "")


def floats_and_int8(x, units):
    import torch
    import torch.nn.functional as F

    dim = x.shape[1]
    weights = torch.randn(units, dim)
    half_x, half = x.bfloat16(), weights.bfloat16()
    int_x, by_column = (torch.randint(-127, 128, s, dtype=torch.int8) for s in (x.shape, (dim, units)))
    by_row = by_column.t().contiguous().t()
    functions = {
        "float32": lambda: F.linear(x, weights),
        "float32, prepacked": prepacked(x, weights),
        "bfloat16": lambda: F.linear(half_x, half),
        "int8 product only": lambda: torch._int_mm(int_x, by_column),
        "int8 product only, transposed": lambda: torch._int_mm(int_x, by_row),
    }
    try:
        functions["bfloat16, prepacked"] = prepacked(half_x, half)
    except RuntimeError:  # simulated processors may have no instructions for it
        pass
    for engine in ("x86", "onednn", "fbgemm"):
        if engine in torch.backends.quantized.supported_engines:
            torch.backends.quantized.engine = engine
            functions[f"dynamic int8, {engine}"] = torch.ao.nn.quantized.dynamic.Linear(dim, units).__call__
    return {name: (lambda f=f: f(x)) if name.startswith("dynamic") else f for name, f in functions.items()}


def onnx_runtime(trits, x, threads):
    "`MatMulNBits` with 2 bits and int8 activations, for each block size that has a fast kernel."
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper

    dim, units = trits.shape
    functions = {}
    for block in ORT_BLOCKS:
        blocks = -(-dim // block)
        codes = np.full((units, blocks * block), 2, np.uint8)  # 2 stands for zero
        codes[:, :dim] = trits.T + 2
        codes = codes.reshape(units, blocks, block // 4, 4)
        packed = sum(codes[..., i] << 2 * i for i in range(4)).astype(np.uint8)
        scales = np.full(units * blocks, 0.03, np.float32)
        node = helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=dim, N=units, bits=2, block_size=block, accuracy_level=4
        )
        graph = helper.make_graph(
            [node], "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [x.shape[0], units])],
            [helper.make_tensor("w", TensorProto.UINT8, packed.shape, packed.tobytes(), raw=True),
             helper.make_tensor("s", TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True)],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)])
        model.ir_version = 10
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0" if threads > 1 else "1")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        binding, result = session.io_binding(), np.empty((x.shape[0], units), np.float32)
        binding.bind_cpu_input("x", x.numpy())
        binding.bind_output("y", "cpu", 0, np.float32, result.shape, result.ctypes.data)
        session.run_with_iobinding(binding)
        exact = x.numpy() @ (trits * np.float32(0.03))
        assert np.abs(result - exact).max() < 0.03 * np.abs(exact).max()
        functions[f"ONNX Runtime 2 bits, block {block}"] = (
            lambda session=session, binding=binding, keep=result: session.run_with_iobinding(binding)
        )
    return functions


class ThreadpoolParameters(ctypes.Structure):  # of ggml.h
    _fields_ = [
        ("cpumask", ctypes.c_bool * 512), ("n_threads", ctypes.c_int), ("prio", ctypes.c_int), ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool), ("paused", ctypes.c_bool),
    ]  # fmt: skip


class Plan(ctypes.Structure):  # of ggml-cpu.h
    _fields_ = [
        ("work_size", ctypes.c_size_t), ("work_data", ctypes.c_void_p), ("n_threads", ctypes.c_int), ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p), ("abort_callback_data", ctypes.c_void_p), ("use_ref", ctypes.c_bool),
    ]  # fmt: skip


class Context(ctypes.Structure):  # ggml_init_params of ggml.h
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


@functools.cache
def ggml():
    "The library of llama.cpp that multiplies, as llama-cpp-python brings it along."
    folder = Path(importlib.util.find_spec("llama_cpp").origin).parent / "lib"
    base, cpu = (ctypes.CDLL(str(folder / f"libggml-{part}.so"), ctypes.RTLD_GLOBAL) for part in ("base", "cpu"))
    address = ctypes.c_void_p
    for library, name, result, *arguments in (
        (base, "init", address, Context), (base, "new_tensor_2d", address, address, ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
        (base, "mul_mat", address, address, address, address), (base, "new_graph", address, address), (base, "get_data", address, address),
        (base, "build_forward_expand", None, address, address), (base, "free", None, address),
        (base, "quantize_chunk", ctypes.c_size_t, ctypes.c_int, *[address] * 2, *[ctypes.c_int64] * 3, address),
        (base, "threadpool_params_default", ThreadpoolParameters, ctypes.c_int),
        (cpu, "threadpool_new", address, ctypes.POINTER(ThreadpoolParameters)),
        (cpu, "graph_plan", Plan, address, ctypes.c_int, address), (cpu, "graph_compute", ctypes.c_int, address, ctypes.POINTER(Plan)),
        (cpu, "cpu_init", None),
    ):  # fmt: skip
        function = getattr(library, f"ggml_{name}")
        function.restype, function.argtypes = result, arguments
        setattr(base, name, function)
    base.cpu_init()
    return base


@functools.cache
def ggml_threads(threads):
    parameters = ggml().threadpool_params_default(threads)
    parameters.poll = 0  # idle threads sleep
    return ggml().threadpool_new(ctypes.byref(parameters))


def llama_cpp(trits, x, threads):
    "A graph of one product in llama.cpp's ternary types, TQ1_0 and TQ2_0, and its newer type of 2 bits, Q2_0, where sizes allow."
    import numpy as np

    (rows, dim), units, functions, library = x.shape, trits.shape[1], {}, ggml()
    weights, exact = np.ascontiguousarray(trits.T * np.float32(0.03)), x.numpy() @ (trits * np.float32(0.03))
    for name, (kind, block) in GGML_TYPES.items():
        if dim % block or (name != "TQ2_0" and rows * dim * units > QUANTIZED_UP_TO):
            continue
        context = library.init(Context(weights.nbytes + 4 * rows * (dim + units) + 2**20, None, False))
        w, inputs = library.new_tensor_2d(context, kind, dim, units), library.new_tensor_2d(context, 0, dim, rows)
        library.quantize_chunk(kind, weights.ctypes.data, library.get_data(w), 0, units, dim, None)
        ctypes.memmove(library.get_data(inputs), x.numpy().ctypes.data, 4 * x.numel())
        outputs, graph = library.mul_mat(context, w, inputs), library.new_graph(context)
        library.build_forward_expand(graph, outputs)
        plan = library.graph_plan(graph, threads, ggml_threads(threads))
        work = ctypes.create_string_buffer(plan.work_size + 64)
        plan.work_data = ctypes.addressof(work)

        def multiply(graph=graph, plan=ctypes.byref(plan), keep=(plan, work)):
            library.graph_compute(graph, plan)

        multiply()
        found = np.frombuffer((ctypes.c_float * (rows * units)).from_address(library.get_data(outputs)), np.float32).reshape(rows, units)
        assert np.abs(found - exact).max() < 0.03 * np.abs(exact).max()
        functions[f"llama.cpp {name}"] = multiply
        GGML_CONTEXTS.append(context)
    return functions


def measure_kernels(threads, shapes=SHAPES, rows=ROWS, everything=True):
    import numpy as np
    import torch

    from keras_mml.native import kernels

    kernels.set_num_threads(threads)
    torch.set_num_threads(threads)
    if name := os.environ.get("KERAS_MML_INSTRUCTIONS"):
        assert kernels.native().use(name), name
    rng, records = np.random.default_rng(0), []
    for dim, units in shapes:
        trits = rng.integers(-1, 2, (dim, units)).astype(np.int8)
        for m in rows:
            x = torch.tensor(rng.normal(size=(m, dim)).astype(np.float32))
            functions = {**ours(trits, x), **floats_and_int8(x, units)}
            if everything:
                functions |= onnx_runtime(trits, x, threads) | llama_cpp(trits, x, threads)
            with torch.inference_mode():
                seconds = medians(functions, settle=2e-3 if threads > 1 else 0)
            while GGML_CONTEXTS:
                ggml().free(GGML_CONTEXTS.pop())
            records.append(dict(dim=dim, units=units, rows=m, threads=threads, seconds=seconds))
            ratio = seconds["float32"] / seconds["packed"]
            print(f"  {dim}x{units} M={m} threads={threads}: {seconds['packed'] * 1e6:.1f} µs, {ratio:.1f}x", file=sys.stderr, flush=True)
    return dict(instruction_set=kernels.native().instructions(), records=records)


def measure_limits():
    "The two limits of the roofline, of one thread."
    from limits import arithmetic, reading

    return dict(multiply_adds=arithmetic(), cache=reading(4 * 2**20), memory=reading(256 * 2**20))


# ── Keras layers ────────────────────────────────────────────────────────────────────────────────────────────────────


def inference():
    "What a careful user of the backend puts around a prediction."
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return torch.inference_mode()
    import contextlib

    return contextlib.nullcontext()


def ready(y):
    return y.block_until_ready() if hasattr(y, "block_until_ready") else y


def one_thread():
    "Before anything is imported: the backends read these when they start."
    os.environ.update(OMP_NUM_THREADS="1", XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    backend = os.environ.get("KERAS_BACKEND", "torch")
    if backend == "torch":
        import torch

        torch.set_num_threads(1)
    if backend == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)


def layer_seconds(layers, x):
    "Median seconds of a call of each layer, inputs being on the backend already."
    import keras

    x = keras.ops.convert_to_tensor(x)
    with inference():
        return medians({name: lambda layer=layer: ready(layer(x)) for name, layer in layers.items()})


def measure_layers():
    "`layer(x)` in Keras, float and packed, and what Keras' own quantization makes of `Dense`; one thread."
    one_thread()
    import keras
    import numpy as np

    from keras_mml.layers import DenseMML

    rng, records = np.random.default_rng(0), []
    for dim, units in SHAPES:
        layers = {"Dense": keras.layers.Dense(units), "packed DenseMML": DenseMML(units)}
        for bits in ("int8", "int4"):
            layers[f"Dense, {bits}"] = keras.layers.Dense(units)
        for name, layer in layers.items():
            layer(np.ones((1, dim), "float32"))
            if "int" in name:
                layer.quantize(name.split(", ")[1])
        layers["packed DenseMML"] = layers["packed DenseMML"].pack()
        for m in ROWS:
            chosen = {name: layer for name, layer in layers.items() if "int" not in name or m * dim * units <= QUANTIZED_UP_TO}
            seconds = layer_seconds(chosen, rng.normal(size=(m, dim)).astype(np.float32))
            records.append(dict(dim=dim, units=units, rows=m, threads=1, seconds=seconds))
            ratio = seconds["Dense"] / seconds["packed DenseMML"]
            print(f"  {keras.backend.backend()} layer {dim}x{units} M={m}: {ratio:.2f}x", file=sys.stderr, flush=True)
    return dict(environment=environment(), records=records)


# ── Whole models ────────────────────────────────────────────────────────────────────────────────────────────────────

MODELS = {"784-256-256-256-10": (784, [256, 256, 256, 10]), "12 layers of 1024": (1024, [1024] * 12)}


def build_model(name, layer):
    import keras

    dim, widths = MODELS[name]
    hidden = [layer(width, activation="relu") for width in widths[:-1]]
    return keras.Sequential([keras.Input((dim,)), *hidden, layer(widths[-1])])


def measure_models():
    "Files, memory of a process that predicts, and times of whole models on torch; one thread."
    one_thread()
    import keras
    import numpy as np

    import keras_mml
    from keras_mml.layers import DenseMML

    records, rng = [], np.random.default_rng(0)
    for name, (dim, _) in MODELS.items():
        models = {"Dense": build_model(name, keras.layers.Dense), "DenseMML": build_model(name, DenseMML)}
        models["packed"] = keras_mml.pack(models["DenseMML"])
        models["Dense, int8"] = keras.models.clone_model(models["Dense"])
        models["Dense, int8"].quantize("int8")
        record = dict(model=name, file={}, memory={}, call={}, predict={})
        with tempfile.TemporaryDirectory() as folder:
            for kind, model in models.items():
                path = f"{folder}/{kind}.keras"
                model.save(path)
                record["file"][kind] = os.path.getsize(path)
                record["memory"][kind] = run("peak_memory", path)
        for m in (1, 32, 512):
            x = rng.normal(size=(m, dim)).astype("float32")
            record["call"][m] = layer_seconds(models, x)
            record["predict"][m] = medians({k: lambda model=model: model.predict(x, batch_size=m, verbose=0) for k, model in models.items()})
        records.append(record)
        print(f"  {name}: " + json.dumps(record["file"]), file=sys.stderr, flush=True)
    return dict(environment=environment(), baseline=run("peak_memory", ""), records=records)


def peak_memory(path):
    "Peak bytes of this process after it has loaded a model and predicted one batch; without a path, after the imports."
    one_thread()
    import keras
    import numpy as np

    import keras_mml  # which loading needs

    if path:
        model = keras.saving.load_model(path)
        model.predict(np.zeros((32, model.input_shape[1]), "float32"), batch_size=32, verbose=0)
    lines = Path("/proc/self/status").read_text().splitlines()  # not `ru_maxrss`, which a process inherits from the one that started it
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


# ── Starting ────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure_start():
    "Seconds that importing this package adds to importing Keras, and of the first packed call."
    keep = dict(PYTHONDONTWRITEBYTECODE="")  # bytecode, as an installed package has it; the first process writes it
    added, first = zip(*((run("start_import", **keep), run("start_first_call", **keep)) for _ in range(6)))
    return dict(import_added=statistics.median(added[1:]), first_call=statistics.median(first[1:]))


def start_import():
    import keras

    before = time.perf_counter()
    import keras_mml

    return time.perf_counter() - before


def start_first_call():
    import numpy as np

    from keras_mml.layers import DenseMML

    layer = DenseMML(256, packed=True)
    layer.build((None, 784))
    x = np.ones((1, 784), "float32")
    before = time.perf_counter()
    layer(x)
    return time.perf_counter() - before


# ── The peer ────────────────────────────────────────────────────────────────────────────────────────────────────────


def peer_layers():
    "In the peer's environment: its `DenseMML` against Keras' `Dense`."
    one_thread()
    import keras
    import numpy as np
    from keras_mml.layers import DenseMML

    rng, records = np.random.default_rng(0), []
    for dim, units in SHAPES:
        layers = {"Dense": keras.layers.Dense(units), "keras-matmulless": DenseMML(units)}
        for m in ROWS:
            seconds = layer_seconds(layers, rng.normal(size=(m, dim)).astype(np.float32))
            records.append(dict(dim=dim, units=units, rows=m, threads=1, seconds=seconds))
    from importlib.metadata import version

    return dict(version=version("keras-matmulless"), keras=keras.__version__, records=records)


def measure_peer():
    "Make the environment if there is none, and measure in it."
    folder = ROOT / "_build" / "peer"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        from importlib.metadata import version

        torch = f"torch=={version('torch').split('+')[0]}"
        install = [python, "-m", "pip", "install", "-q", "keras-matmulless", torch]
        subprocess.run(install, check=True)
    return run("peer_layers", python=str(python))


# ── Processes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def run(function, *arguments, python=sys.executable, **variables):
    "Call a function of this file in a process of its own; its result."
    code = (
        "import json, sys, warnings; warnings.simplefilter('ignore'); sys.path.insert(0, sys.argv[1]); import inference;"
        "result = getattr(inference, sys.argv[2])(*json.loads(sys.argv[3])); print('\\n' + json.dumps(result))"
    )
    command = [python, "-c", code, str(Path(__file__).parent), function, json.dumps(arguments)]
    variables = {"KERAS_BACKEND": "torch", "TF_CPP_MIN_LOG_LEVEL": "3", **variables}
    result = subprocess.run(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


AVX2 = dict(
    KERAS_MML_INSTRUCTIONS="avx2", ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2",
)  # fmt: skip
SSE = dict(KERAS_MML_INSTRUCTIONS="generic", ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41", MKL_ENABLE_INSTRUCTIONS="SSE4_2")
FEWER = [SHAPES[0], SHAPES[2], SHAPES[3]], [1, 8, 32, 128], False


def environment_here():
    import onnxruntime

    return dict(environment(), onnxruntime=onnxruntime.__version__)


PARTS = {
    "limits": lambda: run("measure_limits"),
    "kernels": lambda: {
        # Idle threads sleep: spinning, as is their habit, those of one library would take the processor from the next one.
        str(threads): run("measure_kernels", threads, OMP_WAIT_POLICY="PASSIVE") for threads in dict.fromkeys((1, len(os.sched_getaffinity(0))))
    },
    "simulated": lambda: {
        "avx2": run("measure_kernels", 1, *FEWER, **AVX2),
        "generic": run("measure_kernels", 1, *FEWER, **SSE),
    },
    "layers": lambda: {backend: run("measure_layers", KERAS_BACKEND=backend) for backend in ("torch", "jax", "tensorflow")},
    "models": lambda: run("measure_models"),
    "start": measure_start,
    "peer": measure_peer,
}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    chosen = parser.parse_args().only
    warnings.simplefilter("ignore")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in chosen:
        print(f"→ {part}", flush=True)
        results[part] = PARTS[part]()
        results["environment"] = run("environment_here")
        save(RESULTS, results)
