"""Tables for a terminal and for Markdown."""

import pytest

from effnet_hf.tables import markdown_table, text_table


def test_columns_are_aligned_the_first_to_the_left():
    assert text_table(["model", "top-1"], [["b0", "77.1"], ["widese-b0", "7"]]) == (
        "model      top-1\nb0          77.1\nwidese-b0      7"
    )


def test_markdown_escapes_bars_and_keeps_empty_cells():
    assert markdown_table(["a", ""], [["x|y", ""], ["1", "2"]]) == "| a | |\n|---|---|\n| x\\|y | |\n| 1 | 2 |"


@pytest.mark.parametrize("table", [text_table, markdown_table])
def test_a_row_of_another_length_is_a_mistake_of_ours(table):
    with pytest.raises(ValueError):
        table(["a", "b"], [["1"]])
    assert table(["a", "b"], [])
