"""Columns of labels as Arrow has them, and the classes that are read from them."""

import numpy as np
import pyarrow as pa
import pytest

from effnet_hf.data.labels import MULTI, Columns, read_labels
from effnet_hf.errors import UserError


def read(columns, **options):
    chunked = {name: (None, pa.chunked_array([values])) for name, values in columns.items()}
    return read_labels(chunked, Columns(**options), "the list")


HALVES = pa.array(np.array([1, 0, np.nan, 2], np.float16))


@pytest.mark.parametrize(
    "column, names, numbers",
    [
        (HALVES, ["0", "1", "2"], [1, 0, -1, 2]),
        (pa.array([2.0**53, -1.0, None]), ["9007199254740992"], [0, -1, -1]),
        (pa.array([1.0, 0.0]).dictionary_encode(), ["0", "1"], [1, 0]),
        (pa.array(["1", None, "0"]).dictionary_encode(), ["0", "1"], [1, -1, 0]),
        (pa.array(["1.0", "0.0", "-1.0", " "]), ["0", "1"], [1, 0, -1, -1]),
        (pa.array(["1.0", "0"]), ["0", "1"], [1, 0]),
        (pa.array(["1.0", "a"]), ["1.0", "a"], [0, 1]),
        (pa.array(["-1", "-1.0"]), [], [-1, -1]),
    ],
)
def test_one_class_a_row(column, names, numbers):
    labels = read({"label": column})
    assert labels.names == names and labels.numbers.tolist() == numbers


def test_lists_and_columns_may_be_half_floats():
    lists = pa.array([[1.0], [0.0, 2.0]], pa.list_(pa.float64()))
    halves = pa.ListArray.from_arrays(lists.offsets, pa.array(np.array([1, 0, 2], np.float16)))
    for each in (lists, halves):
        labels = read({"label": each})
        assert labels.names == ["0", "1", "2"] and labels.sets[labels.numbers].tolist() == [[0, 1, 0], [1, 0, 1]]
    labels = read({"a": HALVES.slice(0, 3), "b": pa.array(["1.0", "0.00", "1"])}, label_column=("a", "b"))
    assert labels.numbers[2] == -1 and labels.sets[labels.numbers[:2]].tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    "value, shown", [(np.inf, "inf"), (-np.inf, "inf"), (1e20, r"1e\+20"), (-(2.0**60), "1.15292e")]
)
def test_numbers_without_end_are_no_classes(value, shown):
    for column in (pa.array([0.0, value]), pa.array([[0.0], [value]])):
        with pytest.raises(UserError, match=f"the column label of the list holds {shown}"):
            read({"label": column})


def test_a_part_has_its_own_classes_alone():
    part = read({"label": pa.array(["c", "a", "", "b", "c"])}).part(np.array([0, 2, 3]))
    assert part.names == ["b", "c"] and part.numbers.tolist() == [1, -1, 0]
    part = read({"label": pa.array(["c", "a;b", None, "b"])}, label_separator=";").part(np.array([3, 2, 0]))
    assert part.names == ["b", "c"] and part.numbers.tolist() == [0, -1, 1] and part.sets.tolist() == [[1, 0], [0, 1]]
    part = read({"label": pa.array(["a", "b"])}, problem_type=MULTI).part(np.array([1]))
    assert part.names == ["b"] and part.sets.tolist() == [[1]]
