"""A warm-up leaves nothing behind, whatever happens while it acts; the monitors count what happened."""

import contextlib
import copy
import csv
import math
import pickle
import warnings

import keras
import numpy as np
import pytest
from cases import BACKEND, TERNARY, data_side_by_side, rows, side_by_side
from keras import ops

import keras_mml
from keras_mml import callbacks, layers
from keras_mml.callbacks import BlendedQuantizer, FlipRatio, QuantizationWarmup, SparsityMonitor, ternary_layers, trits_of
from keras_mml.layers import DenseMML
from keras_mml.quantizers import StraightThroughQuantizer

RNG = np.random.default_rng(0)
X = RNG.normal(size=(80, 12)).astype("float32")
Y = (X @ RNG.normal(size=(12, 3)) / 4).astype("float32")
BATCH = dict(batch_size=16, shuffle=False, verbose=0)  # five batches an epoch


@keras.saving.register_keras_serializable(package="test_callbacks")
class Unchanged(StraightThroughQuantizer):
    "A layer with it is a float layer."

    def quantize(self, x):
        return x, ops.ones(())

    def get_config(self):
        return {}


def compiled(model, optimizer=None, **options):
    model.compile(optimizer or keras.optimizers.Adam(0.01), "mse", **options)
    return model


def network(layer=DenseMML, seed=0, optimizer=None, compile_options=None, **arguments):
    keras.utils.set_random_seed(seed)
    hidden = layer(16, activation="relu", name="hidden", **arguments)
    model = keras.Sequential([keras.Input((12,)), hidden, layer(3, name="output", **arguments)])
    return compiled(model, optimizer, **(compile_options or {}))


def numpy_weights(model):
    return [np.array(ops.convert_to_numpy(w)) for w in model.weights]


def state(model):
    return [np.array(ops.convert_to_numpy(v)) for v in [*model.variables, *model.optimizer.variables]]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


class Amounts(keras.callbacks.Callback):
    "Records λ in each batch."

    def __init__(self, warmup):
        super().__init__()
        self.warmup, self.seen = warmup, []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(self.warmup.amount)


def amounts(warmup, epochs=2, model=None, others=()):
    recorder = Amounts(warmup)
    model = model or network()
    history = model.fit(X, Y, epochs=epochs, callbacks=[*others, warmup, recorder], **BATCH)
    return recorder.seen, history.history


# The schedule


def test_linear():
    seen, history = amounts(QuantizationWarmup(steps=8))
    assert seen == [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1, 1]
    assert history["quantization"] == [4 / 8, 1]


def test_cosine_and_initial():
    seen, _ = amounts(QuantizationWarmup(steps=5, schedule="cosine", initial=0.2))
    assert seen == pytest.approx([*(0.2 + 0.8 * (1 - math.cos(math.pi * k / 5)) / 2 for k in range(5)), 1, 1, 1, 1, 1])


def test_a_function_as_schedule_and_epochs():
    seen, history = amounts(QuantizationWarmup(epochs=1.2, schedule=lambda progress: progress**2))
    assert seen == pytest.approx([0, 1 / 36, 4 / 36, 9 / 36, 16 / 36, 25 / 36, 1, 1, 1, 1])
    assert history["quantization"] == pytest.approx([16 / 36, 1])


def test_steps_go_on_over_several_fits():
    model, warmup = network(), QuantizationWarmup(steps=8)
    first, second = amounts(warmup, 1, model)[0], amounts(QuantizationWarmup(steps=8), 1, model)[0]
    assert first + second == amounts(QuantizationWarmup(steps=8))[0]


def test_batches_are_counted_with_accumulated_gradients():
    model = network(optimizer=keras.optimizers.SGD(0.01, gradient_accumulation_steps=5))
    assert amounts(QuantizationWarmup(steps=8), model=model)[0] == [k / 8 for k in range(8)] + [1, 1]


@pytest.mark.skipif(BACKEND == "torch", reason="torch has one step per execution")
def test_several_steps_per_execution():
    model = network(compile_options=dict(steps_per_execution=2))
    seen, _ = amounts(QuantizationWarmup(steps=8), model=model)
    assert seen == [0, 2 / 8, 4 / 8, 5 / 8, 7 / 8, 1]


def test_data_of_unknown_length():
    def batches():
        for i in range(0, len(X), 16):
            yield X[i : i + 16], Y[i : i + 16]

    model, warmup = network(), QuantizationWarmup(steps=8)
    recorder = Amounts(warmup)
    for _ in range(2):
        model.fit(batches(), epochs=1, verbose=0, callbacks=[warmup, recorder])
    if BACKEND != "tensorflow":  # where the optimizer counts the batch that did not come, with and without callbacks
        assert recorder.seen == [k / 8 for k in range(8)] + [1, 1]
    with pytest.raises(ValueError, match="Pass `steps`"):
        network().fit(batches(), epochs=1, verbose=0, callbacks=[QuantizationWarmup(epochs=1)])


def test_models_whose_optimizer_does_not_count():
    model = network()

    class Forget(keras.callbacks.Callback):  # as if another optimizer had been used
        def on_epoch_begin(self, epoch, logs=None):
            self.model.optimizer._iterations.assign(0)

    assert amounts(QuantizationWarmup(steps=8), model=model, others=[Forget()])[0] == [k / 8 for k in range(8)] + [1, 1]


class Updates(keras.callbacks.Callback):
    "As if the optimizer had made another number of updates in each batch."

    def __init__(self, number):
        super().__init__()
        self.number = number

    def on_epoch_end(self, epoch, logs=None):
        self.model.optimizer._iterations.assign(int(5 * (epoch + 1) * self.number))


@pytest.mark.parametrize("number", [0.4, 2])  # loss scaling skips updates; a step of one's own makes several
def test_batches_are_counted_whatever_the_optimizer_does(number):
    assert amounts(QuantizationWarmup(steps=12), epochs=3, others=[Updates(number)])[0] == [k / 12 for k in range(12)] + [1, 1, 1]


def test_accumulated_gradients_that_do_not_divide_an_epoch():
    model = network(optimizer=keras.optimizers.SGD(0.01, gradient_accumulation_steps=4))
    assert amounts(QuantizationWarmup(steps=12), epochs=3, model=model)[0] == [k / 12 for k in range(12)] + [1, 1, 1]


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "arguments",
    [{}, dict(steps=3, epochs=1), dict(steps=0), dict(steps=-1), dict(steps=1.5), dict(steps=True), dict(steps="3"), dict(epochs=0),
     dict(epochs=-0.5), dict(epochs=math.nan), dict(epochs=math.inf), dict(steps=3, schedule="quadratic"), dict(steps=3, schedule=[1]),
     dict(steps=3, schedule=None), dict(steps=3, initial=-0.1), dict(steps=3, initial=1.1), dict(steps=3, initial="0"),
     dict(steps=3, initial=True), dict(steps=3, initial=math.nan), dict(epochs=True)],
)  # fmt: skip
def test_invalid_arguments(arguments):
    with pytest.raises(ValueError, match="Received"):
        QuantizationWarmup(**arguments)


@pytest.mark.any_backend
def test_numpy_scalars_are_numbers():
    assert QuantizationWarmup(steps=np.int64(4), initial=np.float32(0.5)).amount_at(2) == 0.75
    assert QuantizationWarmup(epochs=np.float32(2)).epochs == 2
    FlipRatio(min_flips=np.float32(1e-3), min_delta=np.float64(0.1))


@pytest.mark.parametrize("second", [-1, None, "x", math.nan])
def test_a_schedule_beyond_its_range(second):
    with pytest.raises(ValueError, match="from 0 to 1. Received"):
        amounts(QuantizationWarmup(steps=8, schedule=lambda progress: second if progress else 0))


def test_epochs_are_unknown_before_fit():
    warmup = QuantizationWarmup(epochs=2)
    with pytest.raises(ValueError, match="once `fit` has begun"):
        warmup.amount_at(2)
    amounts(warmup)
    assert warmup.amount_at(2) == 0.2


def squared(progress):
    return progress**2


@pytest.mark.any_backend
@pytest.mark.parametrize("schedule", ["linear", "cosine", squared])
def test_it_can_be_pickled(schedule):
    warmup = QuantizationWarmup(steps=8, schedule=schedule)
    copies = [pickle.loads(pickle.dumps(warmup)), copy.deepcopy(warmup)]
    assert all(w.amount_at(step) == warmup.amount_at(step) for w in copies for step in range(9))
    pickle.dumps([FlipRatio(), SparsityMonitor()])


def test_two_in_one_fit():
    model = network()
    with pytest.raises(ValueError, match="two `QuantizationWarmup`s"):
        model.fit(X, Y, callbacks=[QuantizationWarmup(steps=4), QuantizationWarmup(steps=6)], **BATCH)
    warmup = QuantizationWarmup(steps=4)
    with pytest.raises(ValueError, match="two `QuantizationWarmup`s"):
        model.fit(X, Y, callbacks=[warmup, warmup], **BATCH)
    amounts(warmup, model=model)  # one after the other is fine
    amounts(warmup, model=model)
    assert {type(layer.kernel_quantizer).__name__ for layer in model.layers} == {"AbsmeanTernary"}


@pytest.mark.parametrize("callback", [lambda: QuantizationWarmup(steps=3), FlipRatio, SparsityMonitor])
def test_models_without_latent_ternary_weights(callback):
    with pytest.raises(ValueError, match="no layer with a ternary kernel"):
        network(keras.layers.Dense).fit(X, Y, callbacks=[callback()], **BATCH)
    packed = keras_mml.pack(network())
    with pytest.raises(ValueError, match="is packed"):
        packed.fit(X, Y, callbacks=[callback()], **BATCH)


class Built(keras.Model):
    "It calls itself built, as a subclass without `build` does when it is asked to build."

    def __init__(self):
        super().__init__()
        self.hidden = DenseMML(16)
        self.built = True

    def call(self, x):
        return self.hidden(x)


def test_models_that_are_built_and_their_layers_are_not():
    for model in (Built(), keras.Sequential([DenseMML(3)])):
        with pytest.raises(ValueError, match="without weights yet. Call it on a batch"):
            ternary_layers(model)


@pytest.mark.parametrize("callback", [lambda: QuantizationWarmup(steps=3), FlipRatio])
def test_models_with_frozen_layers_only(callback):
    model = network()
    for layer in model.layers:
        layer.trainable = False
    model = compiled(keras.Sequential([model, keras.layers.Dense(3)]))
    with pytest.raises(ValueError, match="only frozen"):
        model.fit(X, Y, callbacks=[callback()], **BATCH)
    assert "trits_zero" in model.fit(X, Y, callbacks=[SparsityMonitor()], **BATCH).history


def test_frozen_layers_stay_ternary():
    "The first layer of a float network is made ternary and frozen: the second one alone is blended."
    inside = {}

    class Watch(DenseMML):
        def call(self, inputs, training=None):
            inside.setdefault(self.name, set()).add(type(self.kernel_quantizer).__name__)
            return super().call(inputs, training=training)

    model = network(Watch)
    model.get_layer("hidden").trainable = False
    inside.clear()
    history = compiled(model).fit(X, Y, callbacks=[QuantizationWarmup(steps=100), FlipRatio(), SparsityMonitor()], **BATCH).history
    assert inside["hidden"] == {"AbsmeanTernary"} and "BlendedQuantizer" in inside["output"]
    assert "flip_ratio/output" in history and "flip_ratio/hidden" not in history and "trits_zero/hidden" in history


def test_a_warmup_that_is_over_before_it_begins_says_so():
    model = network()
    model.fit(X, Y, **BATCH)
    with pytest.warns(UserWarning, match="Compile the model again"):
        model.fit(X, Y, callbacks=[QuantizationWarmup(steps=3)], **BATCH)
    compiled(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert amounts(QuantizationWarmup(steps=3), 1, model)[0] == [0, 1 / 3, 2 / 3, 1, 1]


# What is computed


def test_zero_is_float_training():
    ternary, dense = network(norm=None), network(keras.layers.Dense)
    dense.set_weights(ternary.get_weights())
    warmup = QuantizationWarmup(steps=1000, schedule=lambda progress: 0.0)
    ours = ternary.fit(X, Y, epochs=4, validation_data=(X[:32], Y[:32]), callbacks=[warmup], **BATCH).history
    theirs = dense.fit(X, Y, epochs=4, **BATCH).history
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)
    np.testing.assert_allclose(ours["val_loss"][-1], ternary.evaluate(X[:32], Y[:32], verbose=0), rtol=1e-5)  # of the ternary model
    assert abs(ours["val_loss"][-1] / dense.evaluate(X[:32], Y[:32], verbose=0) - 1) > 0.01
    plain = network(norm=None).fit(X, Y, epochs=4, **BATCH).history
    assert abs(plain["loss"][-1] / theirs["loss"][-1] - 1) > 0.01  # and ternary training is something else


@pytest.mark.slow_to_compile
@rows(TERNARY)
def test_zero_is_float_training_for_every_layer(cases):
    "All side by side, each with an output and a loss of its own."
    x = data_side_by_side(cases, 16)
    y = {name: np.random.default_rng(2).normal(size=(16, 2)).astype("float32") for name in x}

    def losses(model, *callbacks):
        compiled(model)
        history = model.fit(x, y, epochs=3, callbacks=callbacks, batch_size=8, shuffle=False, verbose=0).history
        return {case.name: history[f"{name}_loss"] for name, case in zip(x, cases, strict=True)}

    ternary, plain, floats = (side_by_side(cases, **o) for o in ({}, {}, dict(scale=Unchanged(), activation_bits=Unchanged())))
    for other in (floats, plain):
        other.set_weights(ternary.get_weights())
    ours, theirs = losses(ternary, QuantizationWarmup(steps=1000, schedule=lambda progress: 0.0)), losses(floats)
    for name, of_plain in losses(plain).items():
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, err_msg=name)
        assert not np.allclose(of_plain, theirs[name], rtol=1e-4), name


@pytest.mark.slow_to_compile
def test_compiled_steps_follow_the_schedule():
    "The same as taking each step with quantizers that know its λ as a number, in functions made for that step."
    model, by_hand = network(), network()
    model.fit(X, Y, epochs=2, callbacks=[QuantizationWarmup(steps=8)], **BATCH)
    own = [(layer.kernel_quantizer, layer.activation_quantizer) for layer in by_hand.layers]
    for step in range(10):
        amount = min(step / 8, 1.0)
        for layer, (kernel, activation) in zip(by_hand.layers, own, strict=True):
            layer.kernel_quantizer = BlendedQuantizer(kernel, amount)
            layer.activation_quantizer = BlendedQuantizer(activation, amount)
        by_hand.train_function = None
        rows = slice(step % 5 * 16, step % 5 * 16 + 16)
        by_hand.train_on_batch(X[rows], Y[rows])
    for ours, theirs in zip(numpy_weights(model), numpy_weights(by_hand), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
    plain = network()
    plain.fit(X, Y, epochs=2, **BATCH)
    assert max(np.abs(a - b).max() for a, b in zip(numpy_weights(model), numpy_weights(plain), strict=True)) > 1e-3


@pytest.mark.parametrize("eagerly", [False, True])
def test_one_is_training_without_the_callback(eagerly):
    warm, plain = (network(compile_options=dict(run_eagerly=eagerly)) for _ in range(2))
    warmup = QuantizationWarmup(steps=7, initial=1.0)
    ours = warm.fit(X, Y, epochs=3, validation_split=0.2, callbacks=[warmup], **BATCH).history
    theirs = plain.fit(X, Y, epochs=3, validation_split=0.2, **BATCH).history
    assert ours.pop("quantization") == [1, 1, 1]
    assert ours == theirs
    assert_same(state(warm), state(plain))


def test_after_the_warmup_training_is_plain(tmp_path):
    model = network()
    model.fit(X, Y, epochs=2, callbacks=[QuantizationWarmup(steps=7), SaveAt(tmp_path / "m.keras", epoch=1)], **BATCH)
    model.fit(X, Y, epochs=2, **BATCH)
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    loaded.fit(X, Y, epochs=2, **BATCH)
    assert_same(state(loaded), state(model))


class SaveAt(keras.callbacks.Callback):
    def __init__(self, path, epoch, batch=None):
        super().__init__()
        self.path, self.epoch, self.batch, self.now = path, epoch, batch, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.now, batch) == (self.epoch, self.batch):
            self.model.save(self.path)

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch and self.batch is None:
            self.model.save(self.path)


def test_others_see_the_ternary_model_meanwhile():
    seen = {}

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen["predicted"] = self.model.predict(X, verbose=0)
            seen["called"] = ops.convert_to_numpy(self.model(X))
            seen["packed"] = keras_mml.pack(self.model).predict(X, verbose=0)
            seen["evaluated"] = self.model.evaluate(X, Y, verbose=0)
            seen["weights"] = self.model.get_weights()
            seen["validated"] = logs["val_loss"]

    warmup = QuantizationWarmup(steps=1000, schedule=lambda progress: 0.0)
    model = network()
    model.fit(X, Y, epochs=1, validation_data=(X, Y), callbacks=[warmup, Look()], **BATCH)
    plain = network(seed=1)
    plain.set_weights(seen["weights"])
    expected = plain.predict(X, verbose=0)
    for name in ("predicted", "called", "packed"):
        np.testing.assert_allclose(seen[name], expected, rtol=1e-4, atol=1e-5)
    assert seen["evaluated"] == pytest.approx(plain.evaluate(X, Y, verbose=0), rel=1e-5)
    assert seen["validated"] == pytest.approx(seen["evaluated"], rel=1e-5)


def test_an_evaluation_of_its_own_blends_nothing():
    model, warmup = network(), QuantizationWarmup(steps=1000)
    with pytest.raises(Stop):
        model.fit(X, Y, callbacks=[warmup, Raise("on_train_batch_end", epoch=0)], **BATCH)
    assert warmup.amount < 1
    assert model.evaluate(X, Y, verbose=0, callbacks=[warmup]) == model.evaluate(X, Y, verbose=0)


def test_mixed_precision():
    model = network(dtype="mixed_float16")
    seen, history = amounts(QuantizationWarmup(steps=8), model=model)
    assert seen[:5] == [k / 8 for k in range(5)] and np.isfinite(history["loss"]).all()


def test_shared_and_nested_layers():
    inputs = keras.Input((12,))
    shared, inner = DenseMML(12, name="shared"), keras.Sequential([DenseMML(12, name="inner"), keras.layers.Dense(3)])
    model = compiled(keras.Model(inputs, inner(shared(shared(inputs)))))
    assert {layer.name for layer in ternary_layers(model)} == {"shared", "inner"} and len(ternary_layers(model)) == 2
    own = [layer.kernel_quantizer for layer in ternary_layers(model)]
    inside = []

    class Watch(DenseMML):
        def call(self, inputs, training=None):
            inside.append(type(self.kernel_quantizer))
            return super().call(inputs, training=training)

    shared.__class__ = Watch
    model.fit(X, Y, callbacks=[QuantizationWarmup(steps=100)], **BATCH)
    assert BlendedQuantizer in inside
    assert own == [layer.kernel_quantizer for layer in ternary_layers(model)]


# Stopping and going on


@pytest.mark.parametrize("stop, warmup", [(1, dict(steps=12)), (2, dict(epochs=3.5, schedule="cosine", initial=0.1)), (3, dict(steps=12))])
def test_training_goes_on_bit_for_bit(warmup, stop, tmp_path):
    model = network()
    whole = model.fit(X, Y, epochs=4, callbacks=[QuantizationWarmup(**warmup)], **BATCH).history
    first = network()
    first.fit(X, Y, epochs=stop, callbacks=[QuantizationWarmup(**warmup)], **BATCH)
    first.save(tmp_path / "m.keras")
    resumed = keras.saving.load_model(tmp_path / "m.keras")
    rest = resumed.fit(X, Y, epochs=4, initial_epoch=stop, callbacks=[QuantizationWarmup(**warmup)], **BATCH).history
    assert_same(state(resumed), state(model))
    assert rest["quantization"] == whole["quantization"][stop:] and rest["loss"] == whole["loss"][stop:]


class Stop(Exception):
    pass


class Raise(keras.callbacks.Callback):
    def __init__(self, hook, error=Stop, epoch=1, batch=2):
        super().__init__()
        self.epoch, self.now = epoch, 0

        def fail(number, logs=None):
            if (self.now, number) == (epoch, batch) or hook == "on_epoch_end" and number == epoch:
                raise error("interrupted")

        self.on_epoch_begin = lambda epoch, logs=None: setattr(self, "now", epoch)
        setattr(self, hook, fail)


def test_backup_and_restore(tmp_path):
    options = dict(epochs=4, **BATCH)
    model = network()
    model.fit(X, Y, callbacks=[QuantizationWarmup(steps=12)], **options)
    for order in (1, -1):
        backup = str(tmp_path / f"backup{order}")

        def both(*others, backup=backup, order=order):
            return [QuantizationWarmup(steps=12), keras.callbacks.BackupAndRestore(backup)][::order] + [*others]

        with pytest.raises(Stop):
            network().fit(X, Y, callbacks=both(Raise("on_train_batch_end", epoch=2)), **options)
        resumed = network(seed=5)
        resumed.fit(X, Y, callbacks=both(), **options)
        assert_same(state(resumed), state(model))


def test_checkpoints_in_the_middle_are_ternary_models(tmp_path):
    model = network()
    checkpoints = [
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True),
        SaveAt(tmp_path / "batch.keras", epoch=1, batch=2),
    ]
    weights = []
    keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: weights.append(model.get_weights()))
    model.fit(X, Y, epochs=3, callbacks=[QuantizationWarmup(steps=12), *checkpoints, keep], **BATCH)
    for epoch in (1, 2, 3):
        expected, plain = network(seed=1), network(seed=2)
        expected.set_weights(weights[epoch - 1])
        loaded = keras.saving.load_model(tmp_path / f"{epoch}.keras")
        plain.load_weights(tmp_path / f"{epoch}.weights.h5")
        for other in (loaded, plain):
            assert_same(numpy_weights(other), weights[epoch - 1])
            np.testing.assert_array_equal(other.predict(X, verbose=0), expected.predict(X, verbose=0))
    loaded = keras.saving.load_model(tmp_path / "batch.keras")
    assert len(loaded.variables) == len(model.variables)
    loaded.fit(X, Y, **BATCH)


def test_the_best_weights_are_restored():
    stopping = keras.callbacks.EarlyStopping(monitor="loss", patience=0, baseline=-1.0, restore_best_weights=True)
    model = network()
    model.fit(X, Y, epochs=5, callbacks=[QuantizationWarmup(steps=100), stopping], **BATCH)
    assert stopping.stopped_epoch >= 0


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_a_step_that_does_not_come_leaves_nothing(error):
    "Another callback fails between the lending and the step."

    def interrupted():
        model = network(norm=None)
        with pytest.raises(error):
            failing = Raise("on_train_batch_begin", error, epoch=0, batch=0)
            model.fit(X, Y, callbacks=[QuantizationWarmup(steps=1000), failing], **BATCH)
        return model

    expected = network(norm=None).evaluate(X, Y, verbose=0)
    assert interrupted().evaluate(X, Y, verbose=0) == expected
    assert interrupted().train_on_batch(X, Y) == pytest.approx(expected, rel=1e-5)
    model, plain = interrupted(), network(norm=None)
    for m in (model, plain):
        m.fit(X, Y, **BATCH)
    assert_same(state(model), state(plain))
    assert not {"make_train_function", "train_step"} & vars(model).keys()
    model = compiled(interrupted())  # which drops the functions
    model.fit(X, Y, **BATCH)
    assert_same(numpy_weights(model), numpy_weights(plain))


def test_the_best_epoch_is_that_of_the_ternary_model(tmp_path):
    model, path = network(norm=None), tmp_path / "best.keras"
    weights, losses = [], []

    class Keep(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            weights.append(self.model.get_weights())
            losses.append(self.model.evaluate(X, Y, verbose=0))

    best = keras.callbacks.ModelCheckpoint(path, monitor="val_loss", save_best_only=True)
    stopping = keras.callbacks.EarlyStopping(patience=10, restore_best_weights=True)
    callbacks_ = [QuantizationWarmup(epochs=4), Keep(), best, stopping]
    compiled(model, keras.optimizers.Adam(0.05))
    history = model.fit(X, Y, epochs=6, validation_data=(X, Y), callbacks=callbacks_, **BATCH).history
    assert history["val_loss"] == pytest.approx(losses, rel=1e-5)
    assert_same(numpy_weights(model), weights[int(np.argmin(losses))])
    assert_same(numpy_weights(keras.saving.load_model(path)), weights[int(np.argmin(losses))])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a function of tensorflow")
@pytest.mark.parametrize("called_before", [False, True])
def test_a_call_that_tensorflow_has_compiled_by_itself(called_before):
    import gc

    import tensorflow as tf

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = DenseMML(16, norm=None), DenseMML(3, norm=None)

        @tf.function
        def call(self, x):
            return self.head(self.hidden(x))

    keras.utils.set_random_seed(0)
    model = compiled(Own())
    model(X)
    if called_before:
        model.predict(X, batch_size=16, verbose=0)
    for _ in range(2):
        model.fit(X, Y, epochs=2, validation_data=(X, Y), callbacks=[QuantizationWarmup(steps=8)], **BATCH)
        gc.collect()
        expected = model.head.call(model.hidden.call(X))
        np.testing.assert_allclose(model.predict(X, batch_size=16, verbose=0), expected, rtol=1e-4, atol=1e-5)
        compiled(model)


@pytest.mark.parametrize(
    "hook, error",
    [("on_train_batch_begin", Stop), ("on_train_batch_end", KeyboardInterrupt), ("on_test_batch_begin", Stop), ("on_epoch_end", Stop)],
)
def test_an_interrupted_training_leaves_nothing(hook, error, tmp_path):
    model = network()
    own = [(layer.kernel_quantizer, layer.activation_quantizer) for layer in model.layers]
    variables = [v.path for v in model.variables]
    failing = Raise(hook, error)
    with pytest.raises(error):
        model.fit(X, Y, epochs=3, validation_data=(X, Y), callbacks=[QuantizationWarmup(steps=12), failing], **BATCH)
    assert [(layer.kernel_quantizer, layer.activation_quantizer) for layer in model.layers] == own
    assert [v.path for v in model.variables] == variables
    model.save(tmp_path / "m.keras")
    plain = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(model.predict(X, verbose=0), plain.predict(X, verbose=0))
    np.testing.assert_allclose(keras_mml.pack(model).predict(X, verbose=0), plain.predict(X, verbose=0), rtol=1e-4, atol=1e-5)
    for other in (model, plain):  # on without a warm-up
        other.fit(X, Y, validation_data=(X, Y), **BATCH)
    assert_same(state(model), state(plain))
    assert model.history.history == plain.history.history
    compiled(model)
    assert amounts(QuantizationWarmup(steps=4), 1, model)[0] == [0, 1 / 4, 2 / 4, 3 / 4, 1]


def test_an_error_inside_a_step_leaves_nothing():
    class Fragile(DenseMML):
        broken = False

        def call(self, inputs, training=None):
            if self.broken and training:
                raise Stop("inside")
            return super().call(inputs, training=training)

    model = network(Fragile)
    own = [(layer.kernel_quantizer, layer.activation_quantizer) for layer in model.layers]
    variables = [v.path for v in model.variables]
    Fragile.broken = True
    with pytest.raises(Exception, match="inside"):
        model.fit(X, Y, callbacks=[QuantizationWarmup(steps=12)], **BATCH)
    Fragile.broken = False
    assert [(layer.kernel_quantizer, layer.activation_quantizer) for layer in model.layers] == own
    assert [v.path for v in model.variables] == variables
    if BACKEND == "jax":  # Keras moves the weights into the step, and loses them if the first one fails, with and without callbacks
        return
    plain = network(Fragile)
    plain.set_weights(model.get_weights())
    for other in (model, plain):
        compiled(other).fit(X, Y, **BATCH)
    assert_same(numpy_weights(model), numpy_weights(plain))


def test_a_model_is_packed_after_the_warmup():
    model = network()
    model.fit(X, Y, epochs=2, callbacks=[QuantizationWarmup(steps=7)], **BATCH)
    np.testing.assert_allclose(keras_mml.pack(model).predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere `fit` builds the model before callbacks are called")
@pytest.mark.parametrize("callback", [lambda: QuantizationWarmup(steps=3), FlipRatio])
def test_models_without_weights(callback):
    model = compiled(keras.Sequential([DenseMML(3)]))
    with pytest.raises(ValueError, match="Call it on a batch"):
        model.fit(X, Y, callbacks=[callback()], **BATCH)


# The monitors


class Change(keras.callbacks.Callback):
    "Sets the kernels by hand at the end of each epoch, before a monitor looks."

    def __init__(self, kernels):
        super().__init__()
        self.kernels = kernels

    def on_epoch_end(self, epoch, logs=None):
        for name, values in self.kernels.items():
            self.model.get_layer(name).kernel.assign(np.asarray(values[epoch], "float32"))


class Record(keras.callbacks.Callback):
    "What a callback such as TensorBoard gets to see."

    def __init__(self):
        super().__init__()
        self.logs = []

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append(dict(logs))


def tiny():
    "Kernels of shapes (2, 2) and (2, 1) with weights of ±2 and 0, which are their own trits times two."
    model = keras.Sequential([keras.Input((2,)), DenseMML(2, name="a"), DenseMML(1, name="b"), keras.layers.Dense(1, name="float")])
    compiled(model, keras.optimizers.SGD(0.0))
    model.set_weights([np.array([[2, 0], [-2, 2]]), np.zeros(2), np.array([[2], [-2]]), np.zeros(1), np.ones((1, 1)), np.zeros(1)])
    return model


KERNELS = {
    "a": [[[2, 0], [-2, 2]], [[2, -2], [0, 2]], [[2, -2], [0, -2]]],  # 0, then 2, then 1 of 4 trits change
    "b": [[[2], [-2]], [[2], [2]], [[2], [2]]],  # 0, then 1, then 0 of 2
}


def run_tiny(*monitors, kernels=KERNELS, epochs=3, model=None):
    record = Record()
    x, y = np.ones((4, 2), "float32"), np.ones((4, 1), "float32")
    history = (model or tiny()).fit(x, y, epochs=epochs, verbose=0, callbacks=[Change(kernels), *monitors, record]).history
    return record.logs, history


def test_flips_are_counted():
    logs, history = run_tiny(FlipRatio())
    assert history["flip_ratio"] == pytest.approx([0, 3 / 6, 1 / 6])
    assert history["flip_ratio/a"] == pytest.approx([0, 2 / 4, 1 / 4])
    assert history["flip_ratio/b"] == pytest.approx([0, 1 / 2, 0])
    assert [epoch["flip_ratio"] for epoch in logs] == history["flip_ratio"]
    assert not any("float" in name for name in history)


def test_shares_of_trits_are_counted():
    logs, history = run_tiny(SparsityMonitor())
    assert history["trits_minus/a"] == [1 / 4, 1 / 4, 2 / 4]
    assert history["trits_zero/a"] == [1 / 4, 1 / 4, 1 / 4]
    assert history["trits_plus/a"] == [2 / 4, 2 / 4, 1 / 4]
    assert history["trits_minus"] == pytest.approx([2 / 6, 1 / 6, 2 / 6])
    assert [epoch["trits_plus"] for epoch in logs] == pytest.approx([3 / 6, 4 / 6, 3 / 6])


def test_totals_only(tmp_path):
    path = tmp_path / "log.csv"
    run_tiny(FlipRatio(per_layer=False), SparsityMonitor(per_layer=False), keras.callbacks.CSVLogger(str(path)))
    with open(path) as file:
        rows = list(csv.DictReader(file))
    names = {name for name in rows[0] if not name.startswith("val_")}  # Keras adds these
    assert names == {"epoch", "loss", "flip_ratio", "trits_minus", "trits_zero", "trits_plus"}
    assert [float(row["flip_ratio"]) for row in rows] == pytest.approx([0, 3 / 6, 1 / 6])


def test_a_monitor_counts_anew_in_each_fit():
    monitor = FlipRatio()
    run_tiny(monitor)
    assert run_tiny(monitor)[1]["flip_ratio"] == pytest.approx([0, 3 / 6, 1 / 6])


def test_monitors_count_what_training_changes():
    model = network()
    before = [trits_of(layer) for layer in model.layers]
    history = model.fit(X, Y, epochs=1, callbacks=[FlipRatio(), SparsityMonitor(), QuantizationWarmup(steps=3)], **BATCH).history
    after = [trits_of(layer) for layer in model.layers]
    assert after[0].dtype == np.int8
    flips = sum((a != b).sum() for a, b in zip(after, before, strict=True))
    assert flips > 0 and history["flip_ratio"] == [flips / sum(a.size for a in after)]
    assert history["trits_zero/hidden"] == [(after[0] == 0).mean()]


@pytest.mark.slow_to_compile
def test_nested_layers_and_equal_names():
    class Twins(keras.Model):
        def __init__(self):
            super().__init__()
            self.twins = [DenseMML(12, name="twin"), DenseMML(12, name="twin"), DenseMML(12, name="twin_1")]
            self.gates = [layers.GRUMML(4, return_sequences=True), layers.GRUMML(4)]
            self.head = keras.layers.Dense(3)

        def call(self, x):
            for twin in self.twins:
                x = twin(x)
            x = ops.expand_dims(x, 1)
            for gate in self.gates:
                x = gate(x)
            return self.head(x)

    keras.utils.set_random_seed(0)
    model = compiled(Twins())
    model(X[:1])
    history = model.fit(X, Y, epochs=1, callbacks=[FlipRatio(), QuantizationWarmup(steps=3)], **BATCH).history
    names = [name for name in history if name.startswith("flip_ratio/")]
    assert len(names) == len(ternary_layers(model)) == 5
    assert sum("twin" in name for name in names) == 3 and sum("input_map" in name for name in names) == 2


# The warning


def stall(losses, flips, **arguments):
    "The warnings of a FlipRatio that sees these losses and ratios."
    monitor = FlipRatio(**arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for loss, ratio in zip(losses, flips, strict=True):
            monitor._watch(ratio, loss)
    return [str(w.message) for w in caught]


@pytest.mark.any_backend
def test_a_stall_is_reported_once():
    (message,) = stall([1.0] * 10, [0.0] * 10, patience=3)
    assert "higher learning rate" in message and "weight decay" in message and "3 epochs" in message
    assert stall([1.0] * 3, [0.0] * 3, patience=3) == []  # the first epoch is the best so far
    assert len(stall([1.0] * 4, [0.0] * 4, patience=3)) == 1


@pytest.mark.any_backend
def test_what_is_no_stall():
    assert stall(np.linspace(1, 0.5, 10), [0.0] * 10, patience=3) == []  # the loss improves
    assert stall([1.0] * 10, [0.01] * 10, patience=3) == []  # trits flip
    assert stall([1.0] * 10, [0, 0, 0, 0.5, 0, 0, 0.5, 0, 0, 0.5], patience=3) == []  # now and then
    assert stall([math.nan] * 10, [0.0] * 10, patience=3) == []  # it has another illness
    assert stall([1.0, math.inf, 0.5, math.nan, 0.2], [0.0] * 5, patience=2) == []
    assert len(stall([1.0, 0.9999, 0.9998, 0.9997], [0.0] * 4, patience=3)) == 1  # hardly improves
    assert stall([1.0, 0.9999, 0.9998, 0.9997], [0.0] * 4, patience=3, min_delta=0) == []


def test_a_loss_that_is_missing_is_reported_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_tiny(FlipRatio(monitor="val_los"))
    messages = [str(w.message) for w in caught if "val_los" in str(w.message)]
    assert len(messages) == 1 and "loss" in messages[0] and "flip_ratio" in messages[0]


def test_a_stall_in_a_real_training():
    model = network(optimizer=keras.optimizers.SGD(1e-9))
    with pytest.warns(UserWarning, match="stalled") as caught:
        model.fit(X, Y, epochs=6, callbacks=[FlipRatio(patience=2)], **BATCH)
    assert sum("stalled" in str(w.message) for w in caught) == 1


@pytest.mark.any_backend
@pytest.mark.parametrize("arguments", [dict(min_flips=-1), dict(min_flips=2), dict(min_delta=-1), dict(patience=0), dict(patience=1.5)])
def test_invalid_arguments_of_the_monitor(arguments):
    with pytest.raises(ValueError, match="Received"):
        FlipRatio(**arguments)


# The plot


def test_in_a_terminal_a_plot_is_only_a_warning():
    with pytest.warns(UserWarning, match="notebooks only"):
        _, history = run_tiny(FlipRatio(plot=True))
    assert history["flip_ratio"] == pytest.approx([0, 3 / 6, 1 / 6])


def test_in_a_notebook_one_figure_is_replaced(monkeypatch):
    pytest.importorskip("matplotlib")
    display = pytest.importorskip("IPython.display")
    import matplotlib.pyplot as plt

    shown, updated = [], []

    class Handle:
        def update(self, figure):
            updated.append(figure)

    def show(figure, display_id):
        assert display_id
        shown.append(figure)
        return Handle()

    monkeypatch.setattr(callbacks, "_in_notebook", lambda: True)
    monkeypatch.setattr(display, "display", show)
    before = plt.get_fignums()
    run_tiny(FlipRatio(plot=True))
    assert len(shown) == 1 and len(updated) == 2 and plt.get_fignums() == before
    lines = updated[-1].axes[0].lines
    assert len(lines) == 3 and list(lines[0].get_ydata()) == pytest.approx([0, 3 / 6, 1 / 6]) and list(lines[0].get_xdata()) == [1, 2, 3]


# What callbacks lend to a model is gone afterwards, and what it hid is there again

LENT = ("train_step", "make_train_function", "train_function", "call", "get_compile_config")


class OwnStep(keras.Sequential):
    "A model with a step of its own class."

    def train_step(self, *args):
        self.steps = getattr(self, "steps", 0) + 1
        return super().train_step(*args)


def with_own(*names):
    "A model with such attributes of its own, which call those of its class and are counted."
    model = network()
    model.used = []
    for name in names:

        def own(*args, name=name, of_class=getattr(model, name)):  # noqa: B008
            model.used.append(name)
            return of_class(*args)

        setattr(model, name, own)
    return model


def belongings(model):
    "What is lent, where it is the object's own."
    own = [{name: vars(model)[name] for name in LENT if name in vars(model)}]
    return own + [(layer.kernel_quantizer, layer.activation_quantizer) for layer in model.layers]


@pytest.mark.parametrize("own", [(), ("train_step",), ("make_train_function",), ("train_step", "make_train_function")])
@pytest.mark.parametrize("hook", [None, "on_train_batch_begin", "on_train_batch_end"])
def test_callbacks_give_back_what_a_model_had(own, hook):
    model = with_own(*own)
    model.fit(X, Y, **BATCH)
    before = belongings(model)
    assert set(own) <= before[0].keys()
    failing = [Raise(hook, epoch=0)] if hook else []
    with pytest.raises(Stop) if hook else contextlib.nullcontext():
        model.fit(X, Y, callbacks=[FlipRatio(), SparsityMonitor(), QuantizationWarmup(steps=1000), *failing], **BATCH)
    model.make_train_function()  # as Keras does before it trains
    assert belongings(model) == before
    model.used.clear()
    compiled(model).fit(X, Y, callbacks=[QuantizationWarmup(steps=5)], **BATCH)
    assert set(model.used) == set(own)


@pytest.mark.parametrize("where", ["class", "object"])
def test_a_models_own_step_computes_the_blended_batches(where):
    keras.utils.set_random_seed(0)
    layers_ = [keras.Input((12,)), DenseMML(16, activation="relu"), DenseMML(3)]
    model = compiled((OwnStep if where == "class" else keras.Sequential)(layers_))
    if where == "object":
        of_class = model.train_step
        model.steps = 0

        def own(*args):
            model.steps += 1
            return of_class(*args)

        model.train_step = own
    plain = network()
    plain.set_weights(model.get_weights())
    expected = amounts(QuantizationWarmup(steps=8), 2, plain)[1]["loss"]
    assert amounts(QuantizationWarmup(steps=8), 2, model)[1]["loss"] == pytest.approx(expected, rel=1e-5)
    assert model.steps > 1 and (where == "class") == ("train_step" not in vars(model))
    assert_same(numpy_weights(model), numpy_weights(plain))


def test_what_somebody_changes_meanwhile_is_left():
    model, other = network(), lambda *args: None

    class Change(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 3:
                self.model.make_train_function = other

    model.fit(X, Y, callbacks=[QuantizationWarmup(steps=100), Change()], **BATCH)
    assert model.make_train_function is other
