"""A layer's forward pass in C, and its gradients, against the operations that define it."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_mml import pack
from keras_mml.layers import DenseMML
from keras_mml.native import kernels, training
from keras_mml.native.training import by_operations, in_one_pass, ternary_linear
from keras_mml.normalization import rms_normalize
from keras_mml.quantizers import absmean_ternary

BACKEND = keras.backend.backend()
pytestmark = pytest.mark.skipif(kernels.native() is None, reason="layers are what their operations say")


def problem(rows, dim, units, gain, bias, seed=0):
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=shape).astype("float32") for shape in ((rows, dim), (dim, units), (units,), (dim,), (rows, units))]
    x, kernel, b, g, upstream = arrays
    return [x, kernel, b if bias else None, g if gain else None], upstream


def gradients(function, arrays, upstream, *arguments):
    "Outputs, and the gradients of their product with `upstream` for all arrays that are there."
    there = [i for i, array in enumerate(arrays) if array is not None]
    if BACKEND == "torch":
        import torch

        tensors = [None if array is None else torch.tensor(array, requires_grad=True) for array in arrays]
        outputs = function(*tensors, *arguments)
        found = torch.autograd.grad((outputs * torch.tensor(upstream)).sum(), [tensors[i] for i in there])
        return [outputs.detach().numpy(), *(g.numpy() for g in found)]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tensors = [None if array is None else tf.constant(array) for array in arrays]
        with tf.GradientTape() as tape:
            tape.watch([tensors[i] for i in there])
            outputs = function(*tensors, *arguments)
        return [outputs.numpy(), *(g.numpy() for g in tape.gradient(outputs, [tensors[i] for i in there], tf.constant(upstream)))]
    import jax

    def loss(values):
        outputs = function(*(values.get(i) for i in range(len(arrays))), *arguments)
        return (outputs * upstream).sum(), outputs

    found, outputs = jax.grad(loss, has_aux=True)({i: arrays[i] for i in there})
    return [np.asarray(outputs), *(np.asarray(found[i]) for i in there)]


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(b).max()))


@settings(max_examples=30)
@given(
    st.integers(1, 60), st.integers(1, 100), st.integers(1, 150), st.booleans(), st.booleans(), st.booleans(), st.integers(2, 8),
    st.booleans(), st.integers(0, 100),
)  # fmt: skip
def test_outputs_and_gradients_are_those_of_the_operations(rows, dim, units, normalize, gain, bias, bits, each_output, seed):
    arrays, upstream = problem(rows, dim, units, gain and normalize, bias, seed)
    arrays[0], arrays[1] = clear_of_ties(*arrays[:2], arrays[3], 2 ** (bits - 1) - 1, seed)
    arguments = normalize, bits, each_output
    close(*(gradients(function, arrays, upstream, *arguments) for function in (ternary_linear, by_operations)))


def clear_of_ties(x, kernel, gain, limit, seed):
    "Inputs and weights that no rounding of their scale takes to another integer or trit."
    rng = np.random.default_rng(seed)
    x = rng.integers(-limit, limit + 1, x.shape) + rng.uniform(-0.3, 0.3, x.shape)
    x[:, 0] = limit  # the largest of its row
    x = np.clip(x, -limit, limit) / (1 if gain is None else gain)
    kernel = np.sign(kernel) * np.where(np.abs(kernel) < 0.5, 0.1 * np.abs(kernel), 0.8 + 0.2 * np.abs(kernel))
    return x.astype("float32"), kernel.astype("float32")


@pytest.mark.parametrize("each_output", [False, True])
def test_trits_are_those_of_division_at_every_edge(each_output):
    "Weights at half the scale and beside it, which a comparison with half the scale would round wrongly."
    rng = np.random.default_rng(0)
    for _ in range(50):
        kernel = rng.normal(size=(33, 70)).astype("float32")
        _, scale = map(ops.convert_to_numpy, absmean_ternary(kernel, axis=0 if each_output else None))
        half = np.broadcast_to(scale / 2, kernel.shape).astype("float32")
        edges = [half, np.nextafter(half, np.float32(np.inf)), np.nextafter(half, np.float32(0)), -half]
        packed, found = np.empty((2, 3, 256), np.uint8), np.empty(70, np.float32)
        assert kernels.native().ternarize(np.ascontiguousarray(edges[rng.integers(4)]), each_output, packed, found)
        trits = training.unpack_ternary(packed, kernel.shape)
        for edge in edges:
            assert kernels.native().ternarize(np.ascontiguousarray(edge), each_output, packed, found)
            trits = training.unpack_ternary(packed, kernel.shape)
            np.testing.assert_array_equal(trits, np.clip(np.round(edge / found), -1, 1))


def test_packing_gives_the_trits_of_the_forward_pass():
    for seed in range(20):
        keras.utils.set_random_seed(seed)
        layer, x = DenseMML(64), np.eye(96, dtype="float32") * 127
        layer.norm = None
        outputs = ops.convert_to_numpy(layer(x))  # each row of the rounded kernel
        trits, scale = training.round_kernel(layer)
        np.testing.assert_allclose(outputs, 127 * trits * scale, rtol=1e-6)


def test_rows_that_are_not_numbers_stay_alone():
    layer, rng = DenseMML(5), np.random.default_rng(0)
    x = rng.normal(size=(4, 20)).astype("float32")
    clean = ops.convert_to_numpy(layer(x))
    x[0, 3], x[1] = np.nan, 0
    y = ops.convert_to_numpy(layer(x))
    assert np.isnan(y[0]).all() and (y[1] == 0).all()
    np.testing.assert_array_equal(y[2:], clean[2:])


def test_where_it_is_not_taken():
    layer = DenseMML(5)
    x = ops.ones((2, 8))
    layer(x)
    assert in_one_pass(layer, x)
    assert not in_one_pass(DenseMML(5, dtype="mixed_bfloat16"), x)
    assert not in_one_pass(layer, keras.Input((8,)))


def test_gradients_of_gradients():
    arrays, upstream = problem(4, 20, 7, True, True)

    def penalty(function):
        "The gradient, for the kernel, of the squared gradient for the inputs."
        arguments = True, 8, False
        if BACKEND == "torch":
            import torch

            tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
            inner = torch.autograd.grad((function(*tensors, *arguments) * torch.tensor(upstream)).sum(), tensors[0], create_graph=True)[0]
            return [g.numpy() for g in torch.autograd.grad((inner**2).sum(), [tensors[1], tensors[3]])]
        if BACKEND == "tensorflow":
            import tensorflow as tf

            tensors = list(map(tf.constant, arrays))
            with tf.GradientTape() as outer:
                outer.watch(tensors)
                with tf.GradientTape() as tape:
                    tape.watch(tensors)
                    outputs = function(*tensors, *arguments)
                squared = tf.reduce_sum(tape.gradient(outputs, tensors[0], tf.constant(upstream)) ** 2)
            return [g.numpy() for g in outer.gradient(squared, [tensors[1], tensors[3]])]
        import jax

        inner = jax.grad(lambda x, *rest: (function(x, *rest, *arguments) * upstream).sum())
        return list(map(np.asarray, jax.grad(lambda *a: (inner(*a) ** 2).sum(), (1, 3))(*arrays)))

    close(penalty(ternary_linear), penalty(by_operations))


@pytest.mark.skipif(BACKEND != "jax", reason="transformations of jax")
def test_transformations_of_jax():
    import jax

    (x, kernel, *_), _ = problem(6, 20, 7, False, False)
    arguments = None, None, True, 8, False
    f, g = (lambda x, kernel, function=function: function(x, kernel, *arguments) for function in (ternary_linear, by_operations))
    close([jax.vmap(f, (0, None))(x[:, None], kernel)[:, 0]], [f(x, kernel)])
    close(jax.jvp(f, (x, kernel), (x, kernel)), jax.jvp(g, (x, kernel), (x, kernel)))
    close([jax.jacfwd(f, 1)(x[:1], kernel)], [jax.jacrev(f, 1)(x[:1], kernel)])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="transformations of tensorflow")
def test_transformations_of_tensorflow(tmp_path):
    import tensorflow as tf

    layer = DenseMML(5, norm_gain=True)
    x = tf.random.normal((3, 4, 8))
    expected = layer(x)
    signature = [tf.TensorSpec((None, 4, 8))]
    graph = tf.function(layer, input_signature=signature)
    assert graph.get_concrete_function().structured_outputs.shape.as_list() == [None, 4, 5]
    assert "KerasMmlTernaryLinear" in {node.op for node in graph.get_concrete_function().graph.as_graph_def().node}
    for function in (graph, tf.function(layer, input_signature=signature, jit_compile=True), lambda x: tf.vectorized_map(layer, x)):
        np.testing.assert_allclose(function(x), expected, atol=1e-5)
    with tf.GradientTape(persistent=True) as tape:  # of a function that saw no tape when it was traced
        tape.watch(x)
        outputs, plain = graph(x), layer(x)
    np.testing.assert_allclose(tape.gradient(outputs, x), tape.gradient(plain, x), atol=1e-5)
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = layer(x[:1])
    assert np.isfinite(tape.jacobian(outputs, x)).all()
    kernel = layer.kernel.value
    with tf.autodiff.ForwardAccumulator([x, kernel], [x, tf.identity(kernel)]) as forwards:
        outputs = layer(x)
    assert np.isfinite(forwards.jvp(outputs)).all()
    with tf.autodiff.ForwardAccumulator(kernel, tf.identity(kernel)) as forwards:
        outputs = layer(x)
    rounded = layer.activation_quantizer(rms_normalize(x, layer.gain))
    np.testing.assert_allclose(forwards.jvp(outputs), tf.matmul(rounded, kernel), atol=1e-5)
    module = tf.Module()
    module.call, module.layer = graph, layer
    tf.saved_model.save(module, tmp_path)  # traced anew, without the operators
    assert b"KerasMml" not in (tmp_path / "saved_model.pb").read_bytes()
    loaded = tf.saved_model.load(tmp_path)  # which owns the variables
    np.testing.assert_allclose(loaded.call(x), expected, atol=1e-5)


@pytest.mark.skipif(BACKEND != "torch", reason="transformations of torch")
def test_transformations_of_torch():
    import torch

    layer, x = DenseMML(5), torch.randn(4, 8)
    expected = layer(x).detach()
    torch.testing.assert_close(torch.func.vmap(layer)(x[:, None])[:, 0].detach(), expected)
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x).detach(), expected)
    jacobian = torch.func.jacrev(layer)(x)
    assert jacobian.shape == (4, 5, 4, 8) and jacobian.isfinite().all()


def test_a_copy_and_a_packed_copy_give_the_same():
    model = keras.Sequential([keras.Input((20,)), DenseMML(30, "relu"), DenseMML(4)])
    x = np.random.default_rng(0).normal(size=(50, 20)).astype("float32")
    np.testing.assert_allclose(*(ops.convert_to_numpy(m(x)) for m in (model, pack(model))), atol=1e-5)


@pytest.mark.skipif(BACKEND != "torch", reason="transformations of torch")
def test_tensors_that_c_cannot_read_are_left_to_the_operations():
    "Another dtype than the layer's, a tangent, a transformation of the parameters: what C would not see, or read wrongly."
    import torch

    layer, x = DenseMML(7, norm_gain=True), torch.randn(4, 5, requires_grad=True)
    layer(x)
    tensors = [v.value for v in (layer.kernel, layer.bias, layer.gain)]
    with torch.autocast("cpu", torch.bfloat16):
        received = torch.autograd.grad(layer(x).sum(), [x, *tensors])
    expected = torch.autograd.grad(by_operations(x, *tensors, True, 8, False).sum(), [x, *tensors])
    torch.testing.assert_close(received, expected)
    function = lambda kernel: layer.stateless_call([kernel, *tensors[1:]], [], x.detach())[0]
    change = torch.randn(5, 7)
    _, tangent = torch.func.jvp(function, (tensors[0],), (change,))
    assert tangent.abs().max() > 0 and torch.func.grad(lambda kernel: function(kernel).sum())(tensors[0]).abs().max() > 0
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.randn(4, 5))
        assert torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent is not None
        with pytest.raises(RuntimeError, match="has no gradient"):
            layer.pack()(dual)
    layer.double()
    assert torch.isfinite(layer(x)).all()
    layer.half()
    assert torch.isfinite(layer(x)).all() and np.isin(layer.ternary_state()["trits"], (-1, 0, 1)).all()
