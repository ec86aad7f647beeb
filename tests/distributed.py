"""What test_distribution.py runs in processes of their own: python distributed.py TASK FOLDER, on jax with 8 devices or under torchrun.

Each way of training is a function that makes a model and says what share of a batch this process brings. The first process writes what the
tests compare into FOLDER.
"""

import json
import sys
from pathlib import Path

import keras
import numpy as np

import keras_mml
from keras_mml import distribution
from keras_mml import layers as L

JAX = keras.backend.backend() == "jax"
TASK, FOLDER = sys.argv[1], Path(sys.argv[2])
pool = keras.layers.GlobalAveragePooling1D


def families():
    "A branch for each family: the shape of what goes in, and the layers that it goes through."
    vector, sequence, tokens, image, sound = (16,), (6, 16), (6,), (8, 8, 3), (12, 4)
    bounds = dict(forget_lower_bound=0.2, learn_lower_bound=True)
    return {
        "dense": (vector, [L.DenseMML(16, activation="relu", norm_gain=True, name="first"), L.DenseMML(12, scale="channel")]),
        "gated": (vector, [L.GLUMML(8, intermediate_size=16), L.SwiGLUMML(8, intermediate_size=16)]),
        "gru": (sequence, [L.GRUMML(8, return_sequences=True, **bounds), L.GRUMML(8, fully_mml=True, num_heads=2)]),
        "lru": (sequence, [L.LRUMML(8, state_dim=8)]),
        "attention": (sequence, [L.AttentionMML(4, 16, causal=False), pool()]),
        "transformer": (tokens, [L.TokenEmbedding(6, 12, 16), L.TransformerBlockMML(16, 16, 4, rate=0.0, mixer="softmax"), pool()]),
        "patches": (image, [L.Patches(4), L.PatchEmbedding(4, 16), L.RMSNorm(use_bias=True), pool()]),
        "conv1d": (sound, [L.Conv1DMML(8, 3, name="listen"), pool()]),
        "conv2d": (image, [L.Conv2DMML(8, 3), L.DepthwiseConv2DMML(3), keras.layers.GlobalAveragePooling2D()]),
    }


def family_model():
    "All branches side by side, each with an output and a loss of its own, so that one compiled step trains them all."
    inputs, outputs = {}, {}
    for name, (shape, branch) in families().items():
        x = inputs[name] = keras.Input(shape, name=name, dtype="int32" if name == "transformer" else "float32")
        for layer in branch:
            x = layer(x)
        outputs[name] = keras.layers.Dense(3, name=f"{name}_head")(x)
    return keras.Model(inputs, outputs), dict.fromkeys(outputs, "mse")


def family_data(rows=32):
    rng, shapes = np.random.default_rng(0), {name: (rows, *shape) for name, (shape, _) in families().items()}
    floats = {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    x = {**floats, "transformer": rng.integers(0, 12, shapes["transformer"]).astype("int32")}
    return x, {name: rng.normal(size=(rows, 3)).astype("float32") for name in x}


def small_model():
    body = [L.DenseMML(32, activation="relu"), L.SwiGLUMML(16, intermediate_size=32), L.RMSNorm(), L.DenseMML(10)]
    return keras.Sequential([keras.Input((16,)), *body]), keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def small_data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(64, 16)).astype("float32"), rng.integers(0, 10, 64)


def ways():
    "Names of ways to train, and functions that take one that makes a model."
    if JAX:
        mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"])
        parallel = distribution.ModelParallel(distribution.layout_map(mesh))
        return {"one": within(None), "data": within(keras.distribution.DataParallel()), "model": within(parallel)}
    return {"one": lambda make: make(), "ddp": lambda make: distribution.data_parallel(make()), "fsdp": lambda make: distribution.fully_shard(make())}


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
        history = dict(zip(history, (values / count).tolist()))
    return history


def write(name, content):
    if distribution.process()[0] == 0:
        (FOLDER / name).write_text(json.dumps(content))


def shape_here(variable):
    "Of what this device has of a variable."
    value = variable.value
    return value.addressable_shards[0].data.shape if JAX else tuple(getattr(value, "to_local", lambda: value)().shape)


def train_families():
    "Losses, weights and the shapes of parts for each way; of the last, also what it predicts, and what its checkpoint does when it is packed."
    data = family_data()
    for way, prepare in ways().items():
        model = prepare(lambda: compiled(family_model))
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
        write("last.json", dict(packed={name: np.abs(packed[name] - predicted[name]).max(axis=1).tolist() for name in packed}, scales=scales))


def scales_of(model):
    "γ as each layer computes it in training, the mean of its whole kernel, and that of the part here."
    import jax

    layers = [layer for layer in model._flatten_layers() if isinstance(layer, L.DenseMML) and layer.scale == "tensor"]
    kernels = [layer.kernel.value for layer in layers]
    gammas = jax.jit(lambda kernels: [layer.kernel_quantizer.quantize(k)[1] for layer, k in zip(layers, kernels)])(kernels)
    means = [[float(np.abs(np.asarray(array)).mean()) for array in (k, k.addressable_shards[0].data)] for k in kernels]
    return [[float(gamma), *mean] for gamma, mean in zip(gammas, means)]


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
            model = prepare(lambda: keras.saving.load_model(path))
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
            model = ways()[way](lambda: compiled(make, optimizer()))
            fit(way, model, small_data(), epochs=2)
            with distribution.gathered(model):
                results.append(model.get_weights())
        for one, other in zip(*results):
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
