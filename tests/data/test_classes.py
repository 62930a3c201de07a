"""Which classes of a checkpoint the classes of the data are: names, numbers, wnids, positions, or a refusal."""

import unicodedata

import numpy as np
import pytest
from timm.data import ImageNetInfo

from effnet_hf.conversion.load import imagenet_names
from effnet_hf.data.classes import match_classes, match_split
from effnet_hf.errors import UserError


DIGITS = ["eight", "five", "four", "nine", "one", "seven", "six", "three", "two", "zero"]
BIRD, MACHINE, MAILLOT, SUIT, CORGI = 134, 517, 638, 639, 264
WORDS = ["tench", "goldfish", "jay"]
WNIDS = ["n01440764", "n01443537", "n01580077"]
POSITION = "--classes_by_position true"


def named(count):
    return [f"LABEL_{i}" for i in range(count)]


def numbers(count):
    return [str(i) for i in range(count)]


MATCHES = {
    # found, known, numbers, what the note says
    "the same": (["a", "b"], ["a", "b"], [0, 1], ""),
    "the same in another order": (["a", "b"], ["b", "a"], [1, 0], "by name; the checkpoint has them in another order"),
    "a part": (["b"], ["a", "b", "c"], [1], "by name; the data has 1 of its 3"),
    "NFD and NFC": ([unicodedata.normalize("NFD", "é")], ["e", unicodedata.normalize("NFC", "é")], [1], "by name"),
    "case and dashes": (
        ["Great_Dane", "hot-dog"], ["hotdog", "great dane"], [1, 0],
        "without regard to case, space, underscore and dash, e.g. Great_Dane is great dane",
    ),
    "a dash at the end": (["A-", "A", "E. coli -", "E._coli"], ["a", "a-", "e. coli", "e. coli -"], [1, 0, 3, 2], "by"),
    "names that differ in case alone": (["A", "a"], ["a", "A"], [1, 0], "by name"),
    "floats that are whole": (["1", "3.0", "+2"], ["1.0", "1.5", "2.0", "3"], [0, 3, 2], "by the numbers"),
    "padded numbers": (["01", "02"], ["1", "2", "3"], [0, 1], "by the numbers that they name, e.g. 01 is 1"),
    "numbers for number words": (numbers(10), DIGITS, [9, 4, 8, 7, 2, 1, 6, 5, 0, 3], "e.g. 0 is zero"),
    "number words for numbers": (DIGITS, numbers(10), [8, 5, 4, 9, 1, 7, 6, 3, 2, 0], "e.g. eight is 8"),
    "some of the number words": (["3", "7"], DIGITS, [7, 5], "the data has 2 of its 10"),
    "numbers for words": (["0", "2"], WORDS, [0, 2], "by index, e.g. 0 is tench; the data has 2 of its 3"),
    "padded numbers for words": (["000", "001", "002"], WORDS, [0, 1, 2], "by index, e.g. 000 is tench"),
    "numbers for LABEL_0": (["0", "1", "10", "2"], named(11), [0, 1, 10, 2], "by index, e.g. 0 is LABEL_0"),
    "wnids for words": (WNIDS[:2], ["jay", "goldfish, Carassius auratus", "tench"], [2, 1], "e.g. n01440764 is tench"),
    "words for wnids": (["jay", "Tench"], WNIDS, [2, 0], "by ImageNet's table of wnids, e.g. jay is n01580077"),
    "some of the wnids": (WNIDS[1:], WNIDS, [1, 2], "by name; the data has 2 of its 3"),
    "one maillot beside the other": (
        ["n03710637", "n03710721"], ["maillot, tank suit", "jay", "maillot"], [2, 0], "e.g. n03710637 is maillot",
    ),
    "a crane that says what it is": (["n02012849"], ["crane (134)", "crane (517)"], [0], "is crane (134)"),
}  # fmt: skip


@pytest.mark.parametrize("found, known, expected, said", MATCHES.values(), ids=MATCHES)
def test_what_matches(found, known, expected, said):
    match = match_classes(found, known, "DIR")
    assert match.numbers.tolist() == expected and match.numbers.dtype == np.int64
    assert said in match.note and bool(match.note) == bool(said)
    assert match.present().tolist() == sorted(expected)
    assert match.is_one_to_one(known) == (len(expected) == len(known))


REFUSALS = {
    "other names": (["a", "b"], ["x", "y"], f"does not know: a, b; it knows 2, e.g. x, y. If .* say {POSITION}"),
    "other names, another number": (["a", "b"], ["x", "y", "z"], "does not know: a, b; it knows 3, e.g. x, y, z.$"),
    "a part of them is known": (["a", "b", "c"], ["b", "c", "d"], "does not know: a; .* Name them as it does"),
    "names that could be two": (["hot dog"], ["hotdog", "HotDog"], "does not know: hot dog"),
    "two names that could be one": (["hot dog", "hot-dog"], ["hotdog", "cat"], "does not know: hot dog, hot-dog"),
    "two numbers that are one": (["1", "01"], ["one", "two"], "does not know: 1, 01"),
    "a sign is no dash": (["-1", "1"], ["1", "one"], "does not know: -1"),
    "digits apart are not digits together": (["1-2"], ["12", "3"], "does not know: 1-2"),
    "numbers from 1 on, of number words": (["0", "1"], ["one", "two"], "does not know: 0; it knows 2"),
    "numbers beyond the last": (["1", "3"], WORDS, f"the class 3, .* 3 classes are numbered 0 to 2. .* say {POSITION}"),
    "numbers from 1 on, without names": (["1", "2"], named(2), "has the class 2, but .* are numbered 0 to 1"),
    "two folders of one number": (["1", "01"], WORDS, "two classes of the same number, e.g. 1 and 01"),
    "number words for LABEL_0": (DIGITS, named(10), f"does not know: eight, five, four and 7 more.*{POSITION}"),
    "words for LABEL_0": (["a", "b"], named(2), f"does not know: a, b; it knows 2, e.g. LABEL_0.*{POSITION}"),
    "numbers that mean nothing": (["cat", "dog"], ["0", "1"], "does not know: cat, dog"),
    "wnids of nothing": (["n00000000"], ["x", "y"], "does not know: n00000000; it knows 2"),
    "wnids among other words": (WNIDS, ["cat", "dog", "jay"], "does not know: n01440764, n01443537; it knows 3"),
    "a crane of two": (["n02012849"], ["crane", "jay"], "class crane may be n02012849 or n03126707, and DIR has one"),
    "a maillot of two": (["n03710721"], ["maillot", "jay"], "class maillot may be n03710637 or n03710721"),
    "two cranes for the word": (["crane", "jay"], ["n02012849", "n01580077"], "class crane, which may be n02012849 or"),
    "a strange wnid for the word": (["cat", "jay"], WNIDS, "does not know: cat; it knows 3"),
    "markup in a name": (["a\x1b[2J"], ["x", "y"], r"does not know: a\\x1b\[2J; it"),
}  # fmt: skip


@pytest.mark.parametrize("found, known, said", REFUSALS.values(), ids=REFUSALS)
def test_what_is_refused(found, known, said):
    with pytest.raises(UserError, match=said):
        match_classes(found, known, "DIR")


@pytest.fixture(scope="module")
def wnids():
    return ImageNetInfo("imagenet-1k").label_names()


@pytest.fixture(scope="module")
def short_words():
    """As torchvision has them: the first word of each, and two of them mended."""
    info = ImageNetInfo("imagenet-1k")
    words = [info.index_to_description(i).split(",")[0] for i in range(1000)]
    words[BIRD], words[SUIT] = "crane bird", "maillot tank suit"
    return words


def test_the_thousand_in_words_without_names_and_in_short(wnids, short_words):
    for known in (imagenet_names(), named(1000), short_words, wnids):
        assert match_classes(wnids, known, "DIR").numbers.tolist() == list(range(1000))
        ten = [BIRD, MACHINE, MAILLOT, SUIT, CORGI, 0, 1, 7, 999, 500]
        match = match_classes([wnids[i] for i in ten], known, "DIR")
        assert match.numbers.tolist() == ten and "the data has 10 of its 1,000" in match.note
        assert not match.is_one_to_one(known)
    back = match_classes(imagenet_names(), wnids, "DIR")
    assert back.numbers.tolist() == list(range(1000))


def test_a_thousand_words_that_are_not_imagenets_are_not_taken_in_its_order(wnids):
    with pytest.raises(UserError, match="does not know: n01440764, n01443537, n01484850 and 997 more"):
        match_classes(wnids, [f"word {i}" for i in range(1000)], "DIR")
    backwards = imagenet_names()[::-1]
    assert match_classes(wnids, backwards, "DIR").numbers.tolist() == list(range(1000))[::-1]


def test_by_position_is_taken_where_no_name_is_the_same():
    match = match_classes(["a", "b"], ["x", "y"], "DIR", by_position=True)
    assert (
        match.numbers.tolist() == [0, 1] and "in order, as --classes_by_position true says, e.g. a is x" in match.note
    )
    assert match_classes(numbers(10), DIGITS, "DIR", by_position=True).numbers.tolist() == list(range(10))
    assert match_classes(["01", "02"], ["2", "1"], "DIR", by_position=True).numbers.tolist() == [1, 0]
    assert match_classes(["1", "2"], named(2), "DIR", by_position=True).numbers.tolist() == [0, 1]
    assert match_classes(["0", "1", "10", "2"], named(4), "DIR", by_position=True).numbers.tolist() == [0, 1, 2, 3]
    assert match_classes(DIGITS, named(10), "DIR", by_position=True).numbers.tolist() == list(range(10))
    assert match_classes(["b", "a"], ["a", "b"], "DIR", by_position=True).numbers.tolist() == [1, 0]  # names decide
    for found, known in ((["a", "x"], ["x", "y"]), (["a"], ["x", "y"])):
        with pytest.raises(UserError, match="does not know: a"):
            match_classes(found, known, "DIR", by_position=True)


def test_classes_without_an_image_need_not_be_known():
    match = match_classes(["a", "other", "b"], ["b", "a"], "DIR", used=np.array([0, 2]))
    assert match.numbers.tolist() == [1, -1, 0] and match.present().tolist() == [0, 1]
    assert match_classes(["0", "1", "7"], WORDS, "DIR", used=[0, 1]).numbers.tolist() == [0, 1, -1]
    assert match_classes(["a", "b"], ["x", "y"], "DIR", by_position=True, used=[1]).numbers.tolist() == [-1, 1]


def test_two_splits_of_one_data_set_are_matched_by_name_alone():
    assert (
        match_split(["b"], ["a", "b"], "val").numbers.tolist() == [1]
        and match_split(["b"], ["a", "b"], "val").note == ""
    )
    assert "Cat is cat" in match_split(["Cat"], ["cat", "dog"], "val").note
    for found, known in ((["0"], ["cat", "dog"]), (WNIDS, WORDS), (["x", "y"], ["a", "b"])):
        with pytest.raises(UserError, match=f"val has classes that training does not know: {found[0]}"):
            match_split(found, known, "val")
