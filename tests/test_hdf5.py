"""Our reader of HDF5 against h5py, on files that h5py writes and on damaged ones."""

import io

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from keras_mml.hdf5 import read_hdf5

pytestmark = pytest.mark.any_backend  # NumPy and h5py

DTYPES = st.sampled_from(["u1", "i1", "<u2", "<i2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8"])
ARRAYS = DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/.\0", exclude_categories=["Cs"]), min_size=1, max_size=30)


def written(arrays, **options):
    file = io.BytesIO()
    with h5py.File(file, "w") as h5:
        for path, array in arrays.items():
            h5.create_dataset(path, data=array, **options)
    return file.getvalue()


@given(st.dictionaries(st.lists(NAMES, min_size=2, max_size=4).map("/".join), ARRAYS, max_size=5))
def test_it_reads_what_h5py_writes(arrays):
    arrays = {path: a for path, a in arrays.items() if not any(other != path and other.startswith(path + "/") for other in arrays)}
    again = read_hdf5(written(arrays))
    assert again.keys() == arrays.keys()
    for path, array in arrays.items():
        assert again[path].dtype == array.dtype and again[path].shape == array.shape
        np.testing.assert_array_equal(again[path], array)


def test_groups_with_many_members_and_many_attributes():
    "The tree of a group has several levels, and its header goes on elsewhere."
    file = io.BytesIO()
    with h5py.File(file, "w") as h5:
        for i in range(2000):
            h5[f"group/{i}"] = np.full(2, i, "<f4")
        for i in range(60):
            h5["group/0"].attrs[f"attribute {i}"] = "x" * 50
            h5["group"].attrs[f"attribute {i}"] = i
    again = read_hdf5(file.getvalue())
    assert len(again) == 2000 and all((again[f"group/{i}"] == i).all() for i in range(2000))


@pytest.mark.parametrize(
    "data, options, message",
    [
        (np.zeros(100), dict(compression="gzip"), "compressed"),
        (np.zeros(100), dict(chunks=(10,)), "layout 2"),
        (np.zeros(3, ">f4"), {}, "little-endian"),
        (np.zeros(3, "c8"), {}, "type 6"),
        (np.zeros(3, "?"), {}, "type 8"),
        ("text", {}, "type 9"),
    ],
)
def test_what_it_does_not_know_has_a_name(data, options, message):
    with pytest.raises(ValueError, match=f"'a/b': .*{message}"):
        read_hdf5(written({"a/b": data}, **options))


def test_links_that_lead_back_are_an_error():
    file = io.BytesIO()
    with h5py.File(file, "w") as h5:
        h5["a/b"] = np.zeros(3)
        h5["a/c"] = h5["a"]
    with pytest.raises(ValueError, match="two places"):
        read_hdf5(file.getvalue())


@given(st.data())
def test_damaged_bytes_are_an_error_or_arrays(data):
    content = bytearray(written({"layers/dense/vars/0": np.ones((3, 4), "<f4"), "layers/dense/vars/1": np.ones(4, "<f4")}))
    used = np.flatnonzero(np.frombuffer(bytes(content), np.uint8))
    for _ in range(data.draw(st.integers(1, 4))):
        content[used[data.draw(st.integers(0, len(used) - 1))]] = data.draw(st.integers(0, 255))
    content = bytes(content)[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else bytes(content)
    try:
        arrays = read_hdf5(content)
    except ValueError:
        return
    assert sum(a.nbytes for a in arrays.values()) <= len(content) * max(1, len(arrays))


def test_a_name_without_an_end_is_an_error():
    content = bytearray(written({"layers/vars/0": np.ones(3, "<f4")}))
    heap = content.index(b"HEAP")
    size, start = (int.from_bytes(content[heap + at : heap + at + 8], "little") for at in (8, 24))
    content[start : start + size] = b"x" * size
    with pytest.raises(ValueError, match="A name in the HDF5 data has no end. The file is damaged."):
        read_hdf5(content)
