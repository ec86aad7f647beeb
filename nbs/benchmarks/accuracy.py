"""Train Dense and DenseMML networks on MNIST, several seeds each, and save what they reach.

    python nbs/benchmarks/accuracy.py [--workers N] [--threads N] [--only GROUP]

Every run is a process of its own. Finished runs go to `accuracy.partial.json`, so the script can be stopped and started again;
only when all are done do they take the place of the earlier ones in `accuracy.json`.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from measure import environment, save
from tqdm import tqdm

RESULTS = Path(__file__).with_suffix(".json")
PARTIAL = Path(__file__).with_suffix(".partial.json")
SEEDS, MAIN_SEEDS = 3, 8  # the main comparison is between close numbers, so it gets more seeds


def planned_runs():
    "All runs as dicts: what is trained, how, and with which seed."
    setup = dict(width=256, depth=3, epochs=20, last="Dense")
    free = dict(setup, activation=None, decay=False)
    both, groups = ("Dense", "DenseMML"), {}
    for activation in None, "relu":
        for decay in False, True:
            name = f"{activation or 'none'}, {'decaying' if decay else 'constant'} rate"
            groups[name] = [dict(setup, layer=layer, activation=activation, decay=decay) for layer in both]
    main = set(groups)
    groups["misplaced scales"] = [dict(free, layer=layer) for layer in ("scale outside", "unit length", "unit length, scale outside")]
    groups["what makes it nonlinear"] = [dict(free, layer="RMSNorm + Dense")]
    groups["ternary last layer"] = [dict(setup, layer="DenseMML", activation="relu", decay=True, last="DenseMML")]
    groups["ten layers"] = [dict(setup, layer=layer, activation="relu", decay=False, depth=10, epochs=6) for layer in both]
    groups["widths"] = [
        dict(setup, layer=layer, activation="relu", decay=True, width=width) for width in (32, 64, 128, 512, 1024) for layer in both
    ]
    return [
        dict(run, group=group, seed=seed)
        for group, runs in groups.items()
        for run in runs
        for seed in range(MAIN_SEEDS if group in main else SEEDS)
    ]


def hidden_layers(kind, units, activation):
    "The Keras layers that make one hidden layer of the network."
    import keras
    from keras import ops

    from keras_mml.layers import DenseMML, RMSNorm
    from keras_mml.quantizers import AbsmaxInt, straight_through

    class ScaleOutside(AbsmaxInt):
        "Forward the same as `AbsmaxInt`, but with the scale outside the straight-through estimator."

        def __call__(self, x):
            q, scale = self.quantize(x)
            return straight_through(ops.convert_to_tensor(x), q) * scale

    if kind == "Dense":
        return [keras.layers.Dense(units, activation=activation)]
    if kind == "RMSNorm + Dense":
        return [RMSNorm(has_learnable_weights=False), keras.layers.Dense(units, activation=activation)]
    bits = ScaleOutside() if "scale outside" in kind else 8
    if "unit length" in kind:  # rows of length 1 instead of root mean square 1
        return [keras.layers.UnitNormalization(), DenseMML(units, activation=activation, norm=None, activation_bits=bits)]
    return [DenseMML(units, activation=activation, activation_bits=bits)]


def train(run):
    "Do one run and return it together with what it measured."
    import keras

    from keras_mml.datasets import load_mnist

    if keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    keras.utils.set_random_seed(run["seed"])
    (x_train, y_train), (x_test, y_test) = load_mnist()
    x_train, x_test = x_train.astype("float32") / 255, x_test.astype("float32") / 255
    y_train, y_test = keras.utils.to_categorical(y_train, 10), keras.utils.to_categorical(y_test, 10)

    hidden = [layer for _ in range(run["depth"]) for layer in hidden_layers(run["layer"], run["width"], run["activation"])]
    (last,) = hidden_layers(run["last"], 10, "softmax")
    model = keras.Sequential([keras.Input((28, 28)), keras.layers.Flatten(), *hidden, last])
    rate = 1e-3
    if run["decay"]:
        steps = run["epochs"] * -(-54_000 // 128)
        rate = keras.optimizers.schedules.PolynomialDecay(rate, steps, end_learning_rate=0.0)
    model.compile(optimizer=keras.optimizers.Adam(rate), loss="categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(
        x_train, y_train, batch_size=128, epochs=run["epochs"], validation_split=0.1, verbose=0
    ).history
    loss, accuracy = model.evaluate(x_test, y_test, batch_size=1000, verbose=0)
    return dict(
        run,
        test_loss=loss,
        test_accuracy=accuracy,
        parameters=model.count_params(),
        train_loss=history["loss"],
        validation_accuracy=history["val_accuracy"],
        environment=environment(),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at once; default: the number of cores")
    parser.add_argument("--threads", default="1", help="threads of each run; default: 1")
    parser.add_argument("--only", help="only the runs of this group")
    args = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "torch")
    os.environ["OMP_NUM_THREADS"] = args.threads  # inherited by the workers

    planned = planned_runs()
    measured = load(PARTIAL)
    done = {settings(run) for run in measured}
    todo = [run for run in planned if settings(run) not in done and args.only in (None, run["group"])]
    todo.sort(key=lambda run: -run["width"])  # the longest first, so that none is left running alone
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for future in tqdm(as_completed([pool.submit(train, run) for run in todo]), total=len(todo), unit="run"):
            measured.append(future.result())
            save(PARTIAL, dict(runs=measured))
    # The earlier runs stay where nothing was measured anew; what is no longer planned goes.
    latest = {settings(run): run for run in load(RESULTS) + measured}
    save(RESULTS, dict(runs=[latest[settings(run)] for run in planned if settings(run) in latest]))
    PARTIAL.unlink(missing_ok=True)


def load(path):
    "The runs saved in a file, none if there is no such file."
    return json.loads(path.read_text())["runs"] if path.exists() else []


def settings(run):
    "What tells one run from another, planned or finished."
    return tuple(run[name] for name in ("group", "layer", "width", "depth", "epochs", "last", "activation", "decay", "seed"))


if __name__ == "__main__":
    sys.exit(main())
