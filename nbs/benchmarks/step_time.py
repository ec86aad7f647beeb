"""Time a training step of Dense and DenseMML side by side, and save the medians.

    python nbs/benchmarks/step_time.py [--backends torch jax tensorflow]

The network of the tutorials (784-256-256-256-10, ReLU), and one of three layers of 1024, Adam, batch 128, one thread. The two kinds
take turns, a few steps at a time, so that both see the same machine. Each backend runs in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measure import environment, save

RESULTS = Path(__file__).with_suffix(".json")
ROUNDS, STEPS, WARM_UP = 60, 10, 5


def network(layer, dim, units):
    "Three hidden layers, compiled."
    import keras

    model = keras.Sequential(
        [keras.Input((dim,))] + [layer(units, activation="relu") for _ in range(3)] + [keras.layers.Dense(10, activation="softmax")]
    )
    model.compile(optimizer="adam", loss="categorical_crossentropy")
    return model


def measure(dim=784, units=256, rounds=ROUNDS):
    "Median milliseconds of a step for each kind, and the median of the ratios of neighbouring rounds."
    import keras
    import numpy as np

    from keras_mml.layers import DenseMML

    if keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(1)
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).random((128, dim), "float32")
    y = keras.utils.to_categorical(np.arange(128) % 10, 10)
    models = {kind.__name__: network(kind, dim, units) for kind in (keras.layers.Dense, DenseMML)}
    times = {name: [] for name in models}
    for round_ in range(WARM_UP + rounds):
        for name, model in models.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                model.train_on_batch(x, y)  # returns the loss as a number, so the step is really done
            if round_ >= WARM_UP:
                times[name].append((time.perf_counter() - start) / STEPS * 1000)
    result = {name: statistics.median(t) for name, t in times.items()}
    result["ratio"] = statistics.median(b / a for a, b in zip(times["Dense"], times["DenseMML"]))
    return dict(result, environment=environment())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["torch", "jax", "tensorflow"])
    parser.add_argument("--here", action="store_true", help="measure in this process and print JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(dict(measure(), wide_ratio=measure(1024, 1024, ROUNDS // 4)["ratio"])))
        return
    results = {}
    for backend in args.backends:
        settings = dict(
            KERAS_BACKEND=backend,
            OMP_NUM_THREADS="1",
            TF_NUM_INTRAOP_THREADS="1",
            TF_NUM_INTEROP_THREADS="1",
            TF_CPP_MIN_LOG_LEVEL="3",
            XLA_FLAGS="--xla_cpu_multi_thread_eigen=false",
        )
        run = subprocess.run([sys.executable, __file__, "--here"], env=os.environ | settings, stdout=subprocess.PIPE, check=True)
        results[backend] = json.loads(run.stdout.splitlines()[-1])
        print(f"{backend}: Dense {results[backend]['Dense']:.2f} ms, DenseMML {results[backend]['DenseMML']:.2f} ms, "
              f"ratio {results[backend]['ratio']:.2f}, of three layers of 1024 {results[backend]['wide_ratio']:.2f}")
    save(RESULTS, dict(steps=ROUNDS * STEPS, batch=128, backends=results))


if __name__ == "__main__":
    main()
