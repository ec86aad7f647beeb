"""Time a training step of the recurrent layers beside `keras.layers.GRU`, and save the medians.

    python nbs/benchmarks/recurrence.py [--backends torch jax]

1024 steps, a batch of 16, 256 inputs and 256 units, all outputs returned. A training step is `train_on_batch` with Adam, compiled as Keras does by
default: eager on torch, one XLA program on jax. The layers take turns in one process, with as many threads as the backend
takes by itself.
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
BATCH, LENGTH, UNITS = 16, 1024, 256
ROUNDS = {"torch": 3, "jax": 9}


def networks():
    "One recurrent layer each."
    import keras

    from keras_mml.layers import GRUMML, LRUMML

    arguments = dict(return_sequences=True)
    layers = {
        "GRU": keras.layers.GRU(UNITS, **arguments),
        "GRUMML, fully_mml": GRUMML(UNITS, fully_mml=True, **arguments),
        "GRUMML": GRUMML(UNITS, **arguments),
        "LRUMML, fully_mml": LRUMML(UNITS, UNITS, fully_mml=True, **arguments),
        "GRUMML, fully_mml, step by step": keras.layers.RNN(GRUMML(UNITS, fully_mml=True).cell, **arguments),
    }
    for name, layer in layers.items():
        model = keras.Sequential([keras.Input((LENGTH, UNITS)), layer])
        model.compile(optimizer="adam", loss="mse")
        yield name, model


def measure():
    "Median seconds of a training step for each layer, and of the ratios of GRU to it in neighbouring rounds."
    import keras
    import numpy as np

    backend = keras.backend.backend()
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(BATCH, LENGTH, UNITS)).astype("float32") for _ in range(2))
    models = dict(networks())
    times = {name: [] for name in models}
    for round_ in range(1 + ROUNDS[backend]):  # the first warms up
        for name, model in models.items():
            start = time.perf_counter()
            model.train_on_batch(x, y)  # returns the loss as a number, so the step is really done
            if round_:
                times[name].append(time.perf_counter() - start)
    return dict(
        seconds={name: statistics.median(t) for name, t in times.items()},
        speedup={name: statistics.median(a / b for a, b in zip(times["GRU"], t)) for name, t in times.items()},
        environment=dict(environment(), cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=list(ROUNDS))
    parser.add_argument("--here", action="store_true", help="measure in this process and print JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure()))
        return
    results = {}
    for backend in args.backends:
        settings = dict(KERAS_BACKEND=backend, TF_CPP_MIN_LOG_LEVEL="3")
        run = subprocess.run([sys.executable, __file__, "--here"], env=os.environ | settings, stdout=subprocess.PIPE, check=True)
        results[backend] = json.loads(run.stdout.splitlines()[-1])
        for name, seconds in results[backend]["seconds"].items():
            print(f"{backend}: {name} {seconds * 1e3:.0f} ms, {results[backend]['speedup'][name]:.2f} times as fast as GRU", flush=True)
    save(RESULTS, dict(batch=BATCH, steps=LENGTH, units=UNITS, rounds=ROUNDS, backends=results))


if __name__ == "__main__":
    main()
