"""Time the runtime against what else predicts with the network for digits, and how long it takes to start; save the medians.

    python nbs/benchmarks/runtime.py [--only calls generation start]

Each part runs in a process of its own and replaces its section of runtime.json. Competitors take turns, on one thread; a call is what a
program would write: an array in, an array (or the library's tensor) out. Starting is timed as whole processes, in an environment
below _build/ with the wheel of this checkout and NumPy, and nothing else.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from inference import medians, one_thread
from measure import environment, save

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_suffix(".json")
WIDTHS = [784, 256, 256, 256, 10]
ROWS = (1, 32, 512)


def classifier(layer):
    import keras

    hidden = [layer(width, activation="relu") for width in WIDTHS[1:-1]]
    return keras.Sequential([keras.Input(WIDTHS[:1]), *hidden, layer(WIDTHS[-1], activation="softmax")])


def in_runtime(model):
    "The model, packed and loaded by the runtime, and the packed model."
    import keras_mml
    from keras_mml import runtime

    packed = keras_mml.pack(model)
    with tempfile.TemporaryDirectory() as folder:
        packed.save(f"{folder}/model.keras")
        return runtime.load(f"{folder}/model.keras"), packed


def in_torch(model):
    "The same float network as torch itself would write it."
    import torch
    from torch import nn

    parts = []
    for layer in model.layers:
        linear = nn.Linear(*layer.kernel.shape)
        with torch.no_grad():
            linear.weight.copy_(layer.kernel.value.T), linear.bias.copy_(layer.bias.value)
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1], nn.Softmax(-1)).eval()


def in_onnx_runtime(model):
    "A session of ONNX Runtime with the same float network, on one thread."
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    nodes, arrays, name = [], [], "x"
    for i, layer in enumerate(model.layers):
        for kind, value in (("w", layer.kernel), ("b", layer.bias)):
            arrays.append(numpy_helper.from_array(np.asarray(value.value.detach()), f"{kind}{i}"))
        last = i == len(model.layers) - 1
        nodes.append(helper.make_node("Gemm", [name, f"w{i}", f"b{i}"], [f"h{i}"]))
        nodes.append(helper.make_node("Softmax" if last else "Relu", [f"h{i}"], ["y" if last else f"r{i}"]))
        name = f"r{i}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", size]) for n, size in (("x", WIDTHS[0]), ("y", WIDTHS[-1]))]
    graph = helper.make_graph(nodes, "digits", ends[:1], ends[1:], arrays)
    onnx_model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    onnx_model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
    return onnxruntime.InferenceSession(onnx_model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def onnx_runtime_functions(session, x):
    "Called with an array, and with memory bound beforehand, which saves what the call costs."
    import numpy as np

    binding, result = session.io_binding(), np.empty((len(x), WIDTHS[-1]), np.float32)
    binding.bind_cpu_input("x", x)
    binding.bind_output("y", "cpu", 0, np.float32, result.shape, result.ctypes.data)
    return {
        "ONNX Runtime": lambda: session.run(None, {"x": x}),
        "ONNX Runtime, bound": lambda keep=result: session.run_with_iobinding(binding),
    }


def measure_calls():
    one_thread()
    import keras
    import numpy as np
    import torch

    from keras_mml.layers import DenseMML
    from keras_mml.native import chain

    def layer_by_layer(x):
        for single in alone:
            x = single(x)
        return x

    keras.utils.set_random_seed(0)
    ours, packed = in_runtime(classifier(DenseMML))
    alone = [chain.Chain([step], (step.dim,)) for rows in ours.program.rows.values() for step in rows.steps]
    floats = classifier(keras.layers.Dense)
    eager, session = in_torch(floats), in_onnx_runtime(floats)
    compiled = torch.compile(in_torch(floats))
    rng, records = np.random.default_rng(0), []
    for rows in ROWS:
        x = rng.random((rows, WIDTHS[0]), dtype=np.float32)
        tensor = torch.from_numpy(x)
        with torch.inference_mode():
            assert np.abs(ours(x) - keras.ops.convert_to_numpy(packed(x))).max() < 1e-6
            assert np.abs(eager(tensor).numpy() - session.run(None, {"x": x})[0]).max() < 1e-5
            functions = {
                "runtime": lambda: ours(x),
                "runtime, layer by layer": lambda: layer_by_layer(x),
                "packed, Keras": lambda: packed(tensor),
                "float32, Keras": lambda: floats(tensor),
                "float32, torch": lambda: eager(tensor),
                **onnx_runtime_functions(session, x),
            }
            try:
                compiled(tensor)
                functions["float32, torch.compile"] = lambda: compiled(tensor)
            except Exception as error:  # where there is no C++ compiler
                print(f"  torch.compile: {type(error).__name__}", file=sys.stderr)
            seconds = medians(functions, seconds=6.0)
        records.append(dict(rows=rows, seconds=seconds))
        print(f"  {rows} rows: " + ", ".join(f"{name} {1e6 * t:.1f} µs" for name, t in seconds.items()), file=sys.stderr, flush=True)
    import onnxruntime

    return dict(environment={**environment(), "onnxruntime": onnxruntime.__version__}, model="-".join(map(str, WIDTHS)), records=records)


def measure_generation():
    "Characters a second of the language model of the tutorial, one at a time, in the runtime and in Keras."
    one_thread()
    import keras
    import numpy as np
    import torch

    from keras_mml.layers import DenseMML, RMSNorm, TokenEmbedding, TransformerBlockMML

    keras.utils.set_random_seed(0)
    blocks = [TransformerBlockMML(128, 256, 4, rate=0.0) for _ in range(2)]
    network = [keras.Input((128,), dtype="int32"), TokenEmbedding(128, 95, 128), *blocks, RMSNorm(), DenseMML(95)]
    ours, packed = in_runtime(keras.Sequential(network))
    token = np.zeros((1, 1), "int32")
    caches, state = {}, [ours.get_initial_cache()]

    def keras_step():
        x = keras.ops.convert_to_tensor(token)
        for layer in packed.layers:
            if isinstance(layer, TransformerBlockMML):
                x, caches[layer.name] = layer(x, cache=caches.get(layer.name, layer.get_initial_cache(1)))
            else:
                x = layer(x)
        return x

    def our_step():
        outputs, state[0] = ours(token, cache=state[0])
        return outputs

    with torch.inference_mode():
        seconds = medians({"runtime": our_step, "packed, Keras": keras_step}, seconds=4.0)
    print("  a character: " + ", ".join(f"{name} {1e6 * t:.0f} µs" for name, t in seconds.items()), file=sys.stderr, flush=True)
    return dict(environment=environment(), seconds=seconds)


# ── Starting ────────────────────────────────────────────────────────────────────────────────────────────────────────

MEMORY = "print(next(l for l in open('/proc/self/status') if l.startswith('VmRSS')).split()[1])"
LOAD = "import numpy as np; from keras_mml import runtime; model = runtime.load({path!r}); model(np.zeros((1, 784), 'float32'))"
STARTS = {
    "Python": "pass",
    "import numpy": "import numpy",
    "import keras_mml.runtime": "import keras_mml.runtime",
    "load and predict": LOAD,
}
KERAS_STARTS = {
    "import keras": "import keras",
    "Keras: load and predict": "import keras, keras_mml, numpy as np; keras.saving.load_model({path!r})(np.zeros((1, 784), 'float32'))",
}


def bare_environment():
    "Python with the wheel of this checkout and NumPy."
    from importlib.metadata import version

    folder = ROOT / "_build" / "bare"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", f"numpy=={version('numpy')}"], check=True)
    with tempfile.TemporaryDirectory() as wheels:
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, str(ROOT)]
        subprocess.run(command, check=True)
        (wheel,) = Path(wheels).glob("*.whl")
        install = [python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", str(wheel)]
        subprocess.run(install, check=True, capture_output=True)  # pip says that Keras is missing, which is the point
    names = subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True).stdout
    return str(python), {entry["name"]: entry["version"] for entry in json.loads(names)}


def seconds_of_process(python, code, **variables):
    start = time.perf_counter()
    variables = {"KERAS_BACKEND": "torch", "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "", **variables}
    subprocess.run([python, "-c", code], check=True, env={**os.environ, **variables}, cwd=tempfile.gettempdir(), stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure_start(rounds=11):
    one_thread()
    import keras

    import keras_mml
    from keras_mml.layers import DenseMML

    python, packages = bare_environment()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/digits.keras"
        keras_mml.pack(classifier(DenseMML)).save(path)
        times = {name: [] for name in (*STARTS, *KERAS_STARTS)}
        for _ in range(rounds):
            for name in times:
                code = {**STARTS, **KERAS_STARTS}[name].format(path=path)
                times[name].append(seconds_of_process(python if name in STARTS else sys.executable, code, PYTHONPATH="" if name in STARTS else str(ROOT)))
        memory = {name: resident(python, STARTS[name].format(path=path)) for name in STARTS}
        first = [first_time(python, LOAD.format(path=path)) for _ in range(3)]
    seconds = {name: statistics.median(t) for name, t in times.items()}
    seconds["load and predict, first time after installing"] = statistics.median(first)
    print("  " + ", ".join(f"{name} {t:.2f} s" for name, t in seconds.items()), file=sys.stderr, flush=True)
    print("  " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in memory.items()), file=sys.stderr, flush=True)
    return dict(environment=environment(), packages=packages, rounds=rounds, seconds=seconds, memory=memory)


def first_time(python, code):
    "Seconds of a process that finds nothing compiled, as Python compiles this package's own modules to its bytecode."
    (package,) = Path(python).parent.parent.glob("lib/python*/site-packages/keras_mml")
    for folder in package.rglob("__pycache__"):
        shutil.rmtree(folder)
    return seconds_of_process(python, code, PYTHONPATH="")


def resident(python, code):
    "Bytes of memory that a process has at its end; the median of five."
    settings = dict(check=True, capture_output=True, text=True, cwd=tempfile.gettempdir())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": ""}
    runs = [subprocess.run([python, "-c", f"{code}\n{MEMORY}"], env=environment, **settings).stdout for _ in range(5)]
    return statistics.median(1024 * int(kilobytes) for kilobytes in runs)


def main():
    parts = dict(calls=measure_calls, generation=measure_generation, start=measure_start)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    chosen = parser.parse_args().only
    if len(chosen) > 1:  # a process for each
        for name in chosen:
            subprocess.run([sys.executable, __file__, "--only", name], check=True)
        return
    os.environ.setdefault("KERAS_BACKEND", "torch")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[chosen[0]] = parts[chosen[0]]()
    save(RESULTS, results)


if __name__ == "__main__":
    main()
