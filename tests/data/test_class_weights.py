import json

import numpy as np
import pytest

from effnet_hf.data.class_weights import class_weights
from effnet_hf.errors import UserError


NAMES, COUNTS = ["cat", "dog", "Red_Fox"], np.array([90, 9, 1])


def weights(tmp_path, content, suffix="csv", names=NAMES, **options):
    file = tmp_path / f"weights.{suffix}"
    content = content if isinstance(content, (str, bytes)) else json.dumps(content)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return class_weights(str(file), names, COUNTS, 100, **options)


def test_balanced_is_scikit_learns_and_every_class_weighs_as_much_in_all():
    found = class_weights("balanced", NAMES, COUNTS, 100)
    assert found.dtype == np.float32
    assert found == pytest.approx([100 / 270, 100 / 27, 100 / 3])
    assert found * COUNTS == pytest.approx(100 / 3)


def test_a_class_without_an_image_weighs_1_and_changes_no_other():
    assert class_weights("balanced", [*NAMES, "owl"], np.append(COUNTS, 0), 100) == pytest.approx(
        [100 / 270, 100 / 27, 100 / 3, 1]
    )


def test_several_labels_weigh_having_one_against_lacking_it(tmp_path):
    found = class_weights("balanced", NAMES, np.array([20, 40, 0]), 40, several=True)
    assert found == pytest.approx([1, 1, 1])
    found = class_weights("balanced", NAMES, np.array([10, 30, 1]), 40, several=True)
    assert found == pytest.approx([3, 1 / 3, 39])
    assert weights(tmp_path, {"cat": 2, "dog": 3, "Red_Fox": 4}, "json", several=True).tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    "content, suffix",
    [
        ("class,weight\ncat,1\ndog,2\nRed_Fox,10\n", "csv"),
        ("red fox;10\ndog;2\ncat;1\n", "csv"),
        ({"dog": 2, "Red_Fox": 10.0, "cat": 1}, "json"),
        ({"dog": "20", "red-fox": 100, "cat": 10}, "json"),
    ],
)
def test_a_files_weights_are_scaled_so_that_an_epochs_images_weigh_1(content, suffix, tmp_path):
    found = weights(tmp_path, content, suffix)
    assert found == pytest.approx(np.array([1, 2, 10]) / 1.18)
    assert np.average(found, weights=COUNTS) == pytest.approx(1)
    assert weights(tmp_path, content, suffix, even=True) == pytest.approx(np.array([1, 2, 10]) / (13 / 3))


@pytest.mark.parametrize(
    "content, names",
    [
        ("1,1\n2,2\n3,3\n", "1 2 3"),
        ("01,1\n02,2\n03,3\n", "1 2 3"),
        ("class,weight\n1,1\n2,2\n3,3\n", "1 2 3"),
        ("2,2\n1,1\n3,3\n", "1 2 3"),
        ("cat.jpg,1\ndog.jpg,2\nfox.jpg,3\n", "cat.jpg dog.jpg fox.jpg"),
        ("name,weight\ncat.jpg,1\ndog.jpg,2\nfox.jpg,3\n", "cat.jpg dog.jpg fox.jpg"),
        ("\ufeff1;1\r\n2;2\r\n3;3\r\n;;\r\n", "1 2 3"),
        ("1\t1\t\n2\t2\t\n3\t3\t\n\n", "1 2 3"),
        ('"1", 1\n"2", "2"\n 3,3', "1 2 3"),
        ('"cat, tabby",1\n"a ""big"" dog",2\n"fox; red",3\n', ["cat, tabby", 'a "big" dog', "fox; red"]),
        ("a;b,1\nc;d,2\ne;f,3\n", ["a;b", "c;d", "e;f"]),
        ("a,b;1\nc,d;2\ne,f;3\n", ["a,b", "c,d", "e,f"]),
        ("class,weight\nclass,1\ndog,2\nfox,3\n", "class dog fox"),
        ("class,weight\nclass,1\n1,2\n2.5,3\n", "class 1 2.5"),
    ],
)
def test_the_first_line_may_be_any_class(content, names, tmp_path):
    names = names.split(" ") if isinstance(names, str) else names
    assert weights(tmp_path, content, names=names, several=True).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "content, suffix, words",
    [
        ("class,weight\ncat,1\ndog,2\n", "csv", "has no weight for Red_Fox; add a line for every class"),
        ({"cat": 1, "dog": 1, "Red_Fox": 1, "owl": 1}, "json", "classes that training does not know: owl"),
        ({"cat": 1, "dog": 0, "Red_Fox": 1}, "json", "the weight of dog is 0; it must be between"),
        ({"cat": 1, "dog": -2, "Red_Fox": 1}, "json", "the weight of dog is -2"),
        ({"cat": 1, "dog": "much", "Red_Fox": 1}, "json", "the weight of dog is 'much'"),
        ({"cat": 1, "dog": True, "Red_Fox": 1}, "json", "the weight of dog is True"),
        ({"cat": 1, "dog": [1], "Red_Fox": 1}, "json", r"the weight of dog is \[1\]"),
        ('{"cat": 1, "dog": NaN, "Red_Fox": 1}', "json", "the weight of dog is nan"),
        ('{"cat": 1, "dog": 1, "dog": 2, "Red_Fox": 1}', "json", "dog"),
        ("cat,1\ndog,2\ndog,3\nRed_Fox,1\n", "csv", "has the class dog twice"),
        ("cat,1,a\ndog,2,b\nRed_Fox,1,c\n", "csv", "has 3 columns in line 1; it needs two"),
        ("cat,1\ndog\nRed_Fox,1\n", "csv", "has one column in line 2; it needs two"),
        ("cat 1\n", "csv", "in line 1; it needs two columns, class and weight, with a comma, a semicolon or a tab"),
        ('cat,1\n"dog,2\nRed_Fox,1\n', "csv", "cannot be read in line 3: unexpected end of data"),
        ("", "csv", "is empty; it needs two columns"),
        (";;\n\n", "csv", "is empty; it needs two columns"),
        ("class,weight\n", "csv", "has no weight for cat, dog, Red_Fox; add a line"),
        ("cat;1,5\ndog;2\nRed_Fox;3\n", "csv", "the weight of cat is '1,5'"),
        ("cat,nan\ndog,2\nRed_Fox,3\n", "csv", "the weight of cat is 'nan'"),
        ("cat,1\nd\xf6g,2\n".encode("latin-1"), "csv", "is no text in UTF-8; save it as that"),
        ("cat,1\ndog,2\nRed_Fox,1\n,3\n", "csv", "classes that training does not know: "),
        ("class,weight\ncat,1\ndog,\nRed_Fox,2\n", "csv", "the weight of dog is ''"),
        ("[1, 2]", "json", "is no JSON object"),
    ],
)
def test_what_a_file_must_not_say_is_refused_in_a_line(content, suffix, words, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        weights(tmp_path, content, suffix)
    assert "\n" not in str(error.value) and "weights." in str(error.value)


def test_a_file_that_is_none(tmp_path):
    for name in ("absent.json", "absent.csv", "."):
        with pytest.raises(UserError, match="is no file; name a CSV or JSON file of classes and weights, or say bal"):
            class_weights(str(tmp_path / name), NAMES, COUNTS, 100)
