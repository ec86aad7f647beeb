"""What test_distribution.py runs in processes of their own: python distributed.py TASK FOLDER, on jax with 8 devices or under torchrun.

Each way of training is a function that makes a model and says what share of a batch this process brings. The first process writes what the
tests compare into FOLDER.
"""

import json
import sys
from pathlib import Path

import keras
import numpy as np
from cases import CASES, FIRST, FULL, Case, data_side_by_side, side_by_side

import keras_mml
from keras_mml import distribution
from keras_mml import layers as L

JAX = keras.backend.backend() == "jax"
TASK, FOLDER = sys.argv[1], Path(sys.argv[2])


def divisible(case):
    "The layer, with sizes that eight devices can share."
    sizes = ("units", "filters", "state_dim", "out_dim", "embedding_dim", "vocab_size")
    arguments = {name: -(-value // 8) * 8 if name in sizes else value for name, value in case.arguments.items()}
    if "groups" in arguments:
        arguments["groups"] = 4  # as many as devices on the axis of the model: with 2 or 6, XLA's partitioner ends the process
    return Case(case.cls, arguments, case.input_shape, None, case.weights, case.tokens)


ROWS = CASES if FULL else [case for case in CASES if case in FIRST]
LAYERS = [divisible(case) for case in ROWS]


def layers_model():
    "All layers side by side, each with an output and a loss of its own, so that one compiled step trains them all."
    model = side_by_side(LAYERS)
    return model, dict.fromkeys(model.output, "mse")


def layers_data(rows=32):
    x = data_side_by_side(LAYERS, rows)
    rng = np.random.default_rng(0)
    return x, {name: rng.normal(size=(rows, 2)).astype("float32") for name in x}


def small_model():
    body = [L.DenseMML(32, activation="relu"), L.SwiGLUMML(16, intermediate_size=32), L.RMSNorm(), L.DenseMML(10)]
    return keras.Sequential([keras.Input((16,)), *body]), keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def small_data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(64, 16)).astype("float32"), rng.integers(0, 10, 64)


def ways():
    "Names of ways to train, and functions that take one that makes a model. Run short, without those that only divide the batch."
    if JAX:
        mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"])
        parallel = distribution.ModelParallel(distribution.layout_map(mesh))
        found = {"one": within(None), "data": within(keras.distribution.DataParallel()), "model": within(parallel)}
    else:
        ddp, fsdp = distribution.data_parallel, distribution.fully_shard
        found = {"one": lambda make: make(), "ddp": lambda make: ddp(make()), "fsdp": lambda make: fsdp(make())}
    return found if FULL else {way: found[way] for way in found if way not in ("data", "ddp")}


def within(value):
    def prepare(make):
        keras.distribution.set_distribution(value)
        return make()

    return prepare


def compiled(make, optimizer=None):
    "Makes the same model each time."
    keras.utils.set_random_seed(0)
    model, loss = make()
    model.compile(optimizer or keras.optimizers.Adam(1e-3, epsilon=1e-4), loss)
    return model


def fit(way, model, data, epochs, batch_size=16):
    "Train, and return the losses of each epoch, averaged over the processes."
    number, count = (0, 1) if way == "one" else distribution.process()
    x, y = keras.tree.map_structure(lambda array: array[number::count], data)
    history = model.fit(x, y, batch_size=batch_size // count, epochs=epochs, shuffle=False, verbose=0).history
    if count > 1:
        import torch

        values = torch.tensor(list(history.values()))
        torch.distributed.all_reduce(values)
        history = dict(zip(history, (values / count).tolist(), strict=True))
    return history


def write(name, content):
    if distribution.process()[0] == 0:
        (FOLDER / name).write_text(json.dumps(content))


def shape_here(variable):
    "Of what this device has of a variable."
    value = variable.value
    return value.addressable_shards[0].data.shape if JAX else tuple(getattr(value, "to_local", lambda: value)().shape)


def train_layers():
    "Losses, weights and shapes of parts for each way; of the last, also what it predicts, and what its checkpoint does when packed."
    data = layers_data()
    for way, prepare in ways().items():
        model = prepare(lambda: compiled(layers_model))
        losses = fit(way, model, data, epochs=2)
        parts = [[v.path, list(v.shape), list(shape_here(v))] for v in model.trainable_variables]
        with distribution.gathered(model):
            write_arrays(way, model.variables)
        write(f"{way}.json", dict(losses=losses, parts=parts))
    predicted = model.predict(data[0], batch_size=16, verbose=0)
    scales = scales_of(model) if JAX else []
    distribution.save(model, FOLDER / "last.keras")
    if distribution.process()[0] == 0:
        keras.distribution.set_distribution(None)
        packed = keras_mml.pack(keras.saving.load_model(FOLDER / "last.keras")).predict(data[0], batch_size=16, verbose=0)
        gaps = {name: np.abs(packed[name] - predicted[name]).max(axis=1).tolist() for name in packed}
        write("last.json", dict(packed=gaps, scales=scales))


def scales_of(model):
    "γ as each layer computes it in training, the mean of its whole kernel, and that of the part here."
    import jax

    layers = [layer for layer in model._flatten_layers() if isinstance(layer, L.DenseMML) and layer.scale == "tensor"]
    kernels = [layer.kernel.value for layer in layers]
    gammas = jax.jit(lambda kernels: [layer.kernel_quantizer.quantize(k)[1] for layer, k in zip(layers, kernels, strict=True)])(kernels)
    means = [[float(np.abs(np.asarray(array)).mean()) for array in (k, k.addressable_shards[0].data)] for k in kernels]
    return [[float(gamma), *mean] for gamma, mean in zip(gammas, means, strict=True)]


def save_each():
    "A checkpoint after two epochs for each way, and what one that goes on for four has become."
    for way, prepare in ways().items():
        model = prepare(lambda: compiled(small_model))
        fit(way, model, small_data(), epochs=2)
        distribution.save(model, FOLDER / f"{keras.backend.backend()}-{way}.keras")
        if way == "one":
            fit(way, model, small_data(), epochs=2)
            write_state(f"{keras.backend.backend()}-complete", model)


def go_on_from_each():
    "Load each checkpoint in each way, and go on for two epochs."
    for path in sorted(FOLDER.glob("*.keras")):
        for way, prepare in ways().items():
            model = prepare(lambda path=path: keras.saving.load_model(path))
            fit(way, model, small_data(), epochs=2)
            with distribution.gathered(model):
                write_state(f"{path.stem}-{keras.backend.backend()}-{way}", model)


def write_state(name, model):
    write_arrays(name, [*model.variables, *model.optimizer.variables])


def write_arrays(name, variables):
    if distribution.process()[0] == 0:
        np.savez(FOLDER / f"{name}.npz", *[keras.ops.convert_to_numpy(v) for v in variables])


def corner_cases():
    "What else must be the same with FSDP as in one process, and what is refused."
    for name, make, optimizer in [
        ("clipping", small_model, lambda: keras.optimizers.SGD(0.5, momentum=0.9, global_clipnorm=0.1)),
        ("weight decay", small_model, lambda: keras.optimizers.AdamW(1e-3, weight_decay=0.1)),
        ("averages", small_model, lambda: keras.optimizers.Adam(1e-3, use_ema=True, ema_overwrite_frequency=3)),
        ("accumulation", small_model, lambda: keras.optimizers.Adam(1e-3, gradient_accumulation_steps=2)),
        ("constraint", constrained_model, lambda: keras.optimizers.Adam(1e-2)),
        ("shared layer", shared_model, lambda: keras.optimizers.Adam(1e-3)),
    ]:
        results = []
        for way in ("one", "fsdp"):
            model = ways()[way](lambda make=make, optimizer=optimizer: compiled(make, optimizer()))
            fit(way, model, small_data(), epochs=2)
            with distribution.gathered(model):
                results.append(model.get_weights())
        for one, other in zip(*results, strict=True):
            assert np.median(np.abs(one - other)) < 1e-6 and np.abs(one - other).max() < 2e-3, (name, np.abs(one - other).max())
    for message, function in {
        "regularizers": lambda: distribution.fully_shard(compiled(regularized_model)),
        "distributed already": lambda: distribution.data_parallel(model),
        "built Keras model": lambda: distribution.data_parallel(keras.Sequential([L.DenseMML(3)])),
    }.items():
        try:
            function()
            raise AssertionError(message)
        except ValueError as error:
            assert message in str(error), error
    write("corner_cases.json", "passed")
    end_with_work_left()


def end_with_work_left():
    "The process leaves while torch's threads wait for Python, to free what is still being sent: as bad as it can come."
    sys.setswitchinterval(10)
    for _ in range(20):
        torch.distributed.broadcast(torch.ones(1000), 0, async_op=True)


def constrained_model():
    return keras.Sequential([keras.Input((16,)), L.DenseMML(10, kernel_constraint=keras.constraints.NonNeg())]), small_model()[1]


def regularized_model():
    return keras.Sequential([keras.Input((16,)), L.DenseMML(10, kernel_regularizer="l2")]), small_model()[1]


def shared_model():
    inputs, layer = keras.Input((16,)), L.DenseMML(16)
    return keras.Model(inputs, L.DenseMML(10)(layer(layer(inputs)))), small_model()[1]


if not JAX:
    import torch

    torch.distributed.init_process_group("gloo")
globals()[TASK]()
if not JAX:
    torch.distributed.destroy_process_group()
