"""Properties that hold for all numbers, not only for the examples on the pages."""

import numpy as np
import pytest
from cases import BACKEND, FULL
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import ops

from keras_mml import quantizers
from keras_mml.constants import SCALE_EPSILON
from keras_mml.quantizers import AbsmaxInt, AbsmeanTernary, absmax_int, absmean_ternary
from keras_mml.testing import gradients

# A few shapes, because jax compiles anew for each
matrices = hnp.arrays(
    np.float32,
    st.sampled_from([(1, 1), (1, 9), (9, 1), (2, 3), (8, 5), (1, 1, 1), (3, 1, 2), (2, 4, 7)]),
    elements=st.floats(-1e4, 1e4, width=32),
)
examples = settings(max_examples=100 if BACKEND == "torch" or FULL else 30)  # on jax and tensorflow, each takes longer


def numpy(tensors):
    return [ops.convert_to_numpy(t) for t in tensors]


@examples
@given(matrices)
def test_trits_are_the_nearest(w):
    trits, scale = numpy(absmean_ternary(w))
    assert set(np.unique(trits)) <= {-1, 0, 1}
    assert scale >= np.float32(SCALE_EPSILON)
    candidates = np.abs(w[None] / scale - np.array([-1, 0, 1]).reshape(3, *[1] * w.ndim))
    np.testing.assert_allclose(np.abs(w / scale - trits), candidates.min(0), atol=1e-5)


@examples
@given(matrices, st.sampled_from([0.5, 2.0, 1024.0]))
def test_trits_do_not_depend_on_the_size_of_the_weights(w, factor):
    if np.abs(w).mean() < 1e-3:
        return
    np.testing.assert_array_equal(*(numpy(absmean_ternary(v))[0] for v in (w, w * np.float32(factor))))


@examples
@given(matrices)
def test_channel_scales_belong_to_the_last_axis(w):
    trits, scale = numpy(AbsmeanTernary("channel").quantize(w))
    assert scale.shape == (1,) * (w.ndim - 1) + w.shape[-1:]
    for unit in range(w.shape[-1]):
        alone, alone_scale = numpy(absmean_ternary(w[..., unit]))
        np.testing.assert_allclose(scale[..., unit].item(), alone_scale, rtol=1e-5)


@examples
@given(matrices, st.integers(2, 8))
def test_integers_are_in_range_and_within_half_a_step(x, bits):
    q, scale = numpy(absmax_int(x, bits=bits))
    limit = 2 ** (bits - 1) - 1
    assert np.array_equal(q, np.round(q)) and np.abs(q).max() <= limit
    assert (np.abs(q * scale - x) <= scale / 2 * (1 + 1e-4)).all()
    rows = np.abs(x).max(-1) > SCALE_EPSILON
    assert (np.abs(q).max(-1)[rows] == limit).all()  # the largest value of a row uses the whole range


@examples
@given(matrices)
def test_rows_do_not_see_each_other(x):
    q, _ = numpy(absmax_int(x))
    np.testing.assert_array_equal(q[:1], numpy(absmax_int(x[:1]))[0])


@examples
@given(matrices, st.sampled_from([AbsmeanTernary(), AbsmeanTernary("channel"), AbsmaxInt(), AbsmaxInt(3)]))
def test_gradients_pass_unchanged(x, quantizer):
    upstream = np.linspace(-1, 1, x.size, dtype="float32").reshape(x.shape)
    (gradient,) = gradients(lambda x: ops.multiply(quantizer(x), upstream), x)
    np.testing.assert_array_equal(gradient, upstream)


@examples
@given(matrices, st.floats(-1e4, 1e4, width=32))
def test_the_forward_pass_uses_exactly_three_numbers(w, outlier):
    w.flat[0] = outlier
    _, scale = numpy(absmean_ternary(w))
    assert set(np.unique(ops.convert_to_numpy(AbsmeanTernary()(w)))) <= {-scale.item(), 0.0, scale.item()}


def test_ties_round_to_even():
    q, _ = numpy(absmax_int(np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])))
    np.testing.assert_array_equal(q, [[127, 0, 2, 2, 0, -2]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_visible(bad):
    w = np.ones((3, 3), "float32")
    w[1, 1] = bad
    assert not np.isfinite(ops.convert_to_numpy(AbsmeanTernary()(w))).any()
    assert not np.isfinite(ops.convert_to_numpy(AbsmaxInt()(w))[1]).any()
    np.testing.assert_allclose(ops.convert_to_numpy(AbsmaxInt()(w))[[0, 2]], 1)


def test_aliases_are_documented_quantizers():
    for name in quantizers.ALIASES:
        assert isinstance(quantizers.get(name), quantizers.StraightThroughQuantizer)
    assert quantizers.get("absmean").get_config() == {"scale": "tensor"}
    assert quantizers.get("absmean_channel").get_config() == {"scale": "channel"}
    assert quantizers.get("absmax").get_config() == {"bits": 8}
