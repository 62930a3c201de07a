import io
import pickle
import signal
import tarfile
import threading
import time

import datasets
import numpy as np
import pytest
import torch

from effnet_hf.data import BatchPlan, stream
from effnet_hf.data.labels import Columns
from effnet_hf.data.named_dataset import open_named
from effnet_hf.data.stream import read_ahead
from effnet_hf.errors import UserError

from .torture import encode, photo


CARD = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': bird
          '1': cat
          '2': dog
  splits:
  - name: train
    num_examples: 36
    num_bytes: 1
  - name: validation
    num_examples: 11
    num_bytes: 1
---
"""
LABELS = datasets.ClassLabel(names=["bird", "cat", "dog"])


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def rows(start, count):
    for i in range(start, start + count):
        yield {"image": {"bytes": encode(photo(i, 50, 40), "JPEG"), "path": f"{i}.jpg"}, "label": i % 3}


def write_parquet(root, card=CARD, label=LABELS, validation=True, files=3):
    (root / "data").mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "label": label})
    for i in range(files):
        part = datasets.Dataset.from_list(list(rows(12 * i, 36 // files)), features=features)
        part.to_parquet(root / "data" / f"train-{i:05}-of-{files:05}.parquet")
    if validation:
        part = datasets.Dataset.from_list(list(rows(100, 11)), features=features)
        part.to_parquet(root / "data" / "validation-00000-of-00001.parquet")
    if card:
        (root / "README.md").write_text(card)
    return str(root)


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("named"))


def pixels(batches):
    return [(batch["index"].tolist(), batch["pixel_values"]) for batch in batches]


def same(a, b):
    return len(a) == len(b) and all(i == j and torch.equal(x, y) for (i, x), (j, y) in zip(a, b))


def test_it_trains_from_a_data_set_by_name(loaders, name):
    ours = loaders({"data_dir": None, "dataset_name": name})
    assert ours.class_names == ["bird", "cat", "dog"]
    seen = [(i, label) for b in ours.train.epoch(0) for i, label in zip(b["index"].tolist(), b["labels"].tolist())]
    assert sorted(i for i, _ in seen) == list(range(36)) and all(label == i % 3 for i, label in seen)
    assert sorted(i for b in ours.val.epoch() for i in b["index"].tolist()) == list(range(11))


def test_val_fraction_splits_what_has_no_validation(tmp_path):
    source = open_named(write_parquet(tmp_path / "set", card=None, validation=False), val_fraction=0.25)
    assert np.bincount(source.train.labels).tolist() == [9, 9, 9]
    assert np.bincount(source.val.labels).tolist() == [3, 3, 3]


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_labels_may_be_numbers_or_words(tmp_path, kind):
    root = write_parquet(tmp_path / "set", card=None, label=datasets.Value(kind), validation=False)
    source = open_named(root, val_fraction=0.25)
    assert source.class_names == ["0", "1", "2"] and sorted(set(source.train.labels)) == [0, 1, 2]


def test_problems_are_one_sentence_each(tmp_path, name):
    with pytest.raises(UserError, match=r"--dataset_name nobody/nothing cannot be loaded: [^\n]*$"):
        open_named("nobody/nothing")
    with pytest.raises(UserError, match="--dataset_name .*cannot be loaded: .*'other' not found"):
        open_named(name, "other")
    bare = write_parquet(tmp_path / "bare", card=None, validation=False)
    with pytest.raises(UserError, match=r"has none of val, valid, .*--val_fraction 0.1"):
        open_named(bare)
    unknown_size = write_parquet(tmp_path / "unknown", card=None)
    with pytest.raises(UserError, match="does not say how many images its split train has"):
        open_named(unknown_size, streaming=True)
    with pytest.raises(UserError, match="does not know: bird, cat; it knows 2, e.g. dog, fish"):
        open_named(name, class_names=["dog", "fish"])


def write_table(root, images, labels, label, card=None):
    features = datasets.Features({"image": datasets.Image(), "label": label})
    table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    (root / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        table.to_parquet(root / f"data/{split}.parquet")
    if card:
        counted = card.replace("num_examples: 36", f"num_examples: {len(labels)}")
        (root / "README.md").write_text(counted.replace("num_examples: 11", f"num_examples: {len(labels)}"))
    return str(root)


IMAGE = {"bytes": encode(photo(1, 30, 30), "JPEG"), "path": None}


def labels_of(source, split="train"):
    """The classes of a split's images, or the sets of them."""
    numbers, names = getattr(source, split).labels, source.class_names
    if source.label_sets is None:
        return [names[number] for number in numbers]
    return [[name for name, has in zip(names, source.label_sets[number]) if has] for number in numbers]


MULTI, SINGLE = "multi_label_classification", "single_label_classification"
INTEGERS, WORDS, FLOATS = (datasets.Value(kind) for kind in ("int64", "string", "float64"))


@pytest.mark.parametrize(
    "labels, kind, options, read",
    [
        ([0, None, 1], LABELS, {}, ["bird", "cat"]),
        ([0, -1, 1], LABELS, {}, ["bird", "cat"]),
        ([5, None, -1, 6], INTEGERS, {}, ["5", "6"]),
        (["a", None, "", " ", "b"], WORDS, {}, ["a", "b"]),
        (["nan", "None", "NA"], WORDS, {}, ["nan", "None", "NA"]),
        (["1", "2", "-1"], WORDS, {}, ["1", "2"]),
        ([1.0, 2.0, None, float("nan")], FLOATS, {}, ["1", "2"]),
        ([True, None, False], datasets.Value("bool"), {}, ["true", "false"]),
        ([0, 1, 1], LABELS, {"problem_type": MULTI}, [["bird"], ["cat"], ["cat"]]),
        ([[0, 2], [], None, [1]], datasets.List(LABELS), {}, [["bird", "dog"], [], ["cat"]]),
        ([[0, 2], [-1], [1]], datasets.List(LABELS), {}, [["bird", "dog"], ["cat"]]),
        ([["b", "a"], ["b"]], datasets.List(WORDS), {}, [["a", "b"], ["b"]]),
        ([[7], [10, 7]], datasets.List(INTEGERS), {}, [["7"], ["10", "7"]]),
        ([["b"], ["a"]], datasets.List(WORDS), {"problem_type": SINGLE}, ["b", "a"]),
        (["a, b", "b"], WORDS, {"label_separator": ","}, [["a", "b"], ["b"]]),
        (["a|b", "c", "d"], WORDS, {}, ["a|b", "c", "d"]),  # no class of its parts, and only one
    ],
)
def test_what_a_column_of_labels_says(tmp_path, labels, kind, options, read):
    root = write_table(tmp_path / "set", [IMAGE] * len(labels), labels, kind)
    source = open_named(root, columns=Columns(**options))
    assert labels_of(source) == labels_of(source, "val") == read
    left_out = [note for note in source.notes if f"of {len(labels)} images of split train" in note]
    assert len(left_out) == (len(read) < len(labels))


@pytest.mark.parametrize(
    "labels, kind, options, words",
    [
        ([None, None], LABELS, {}, "split train of .* has no labels: .* for all of its 2 images"),
        ([-1, -1], LABELS, {}, "split train of .* has no labels"),
        ([float("nan")] * 2, FLOATS, {}, "split train of .* has no labels"),
        (["", None], WORDS, {}, "split train of .* has no labels"),
        ([0.5, 1.5, 2.5], datasets.Value("float32"), {}, "the column label of .* holds float, no classes"),
        ([b"a", b"b", b"c"], datasets.Value("binary"), {}, "holds binary, no classes"),
        ([[0, 1, 0], [1, 0, 0]], datasets.List(INTEGERS), {}, "a list in which 0 stands twice; .* no row of 0 and 1"),
        ([["a", "b"], ["a"]], datasets.List(WORDS), {"problem_type": SINGLE}, "has lists of none or several labels"),
        ([["a"]], datasets.List(WORDS), {"label_separator": ";"}, "--label_separator: .* holds lists"),
        (["a|b", "b|c"], WORDS, {}, r"holds 'a\|b': .*--label_separator '\|'; .*--problem_type single"),
        (["a;b", "b", "a", "c"], WORDS, {}, "--label_separator ';'"),
        ([-3, 1], INTEGERS, {}, "has the label -3; whole numbers count classes from 0, and -1 is none"),
    ],
)
def test_labels_that_are_none_are_one_sentence(tmp_path, labels, kind, options, words):
    with pytest.raises(UserError, match=words):
        open_named(write_table(tmp_path / "set", [IMAGE] * len(labels), labels, kind), columns=Columns(**options))


def write_columns(root, **columns):
    """A data set of three images; columns with a feature each."""
    features = {name: feature for name, (feature, _) in columns.items()}
    table = datasets.Dataset.from_dict({n: v for n, (_, v) in columns.items()}, features=datasets.Features(features))
    root.mkdir()
    for split in ("train", "validation"):
        table.to_parquet(root / f"{split}.parquet")
    return str(root)


PICTURES = datasets.Image(), [IMAGE] * 3
SCENES = datasets.ClassLabel(names=["indoor", "outdoor"]), [1, 0, 1]
ANIMALS = LABELS, [0, 1, 2]


@pytest.mark.parametrize(
    "columns, options, read, note",
    [
        ({"scene": SCENES, "label": ANIMALS}, {}, ["bird", "cat", "dog"], "the labels are the column label of"),
        ({"scene": SCENES, "labels": ANIMALS}, {}, ["bird", "cat", "dog"], "--label_column can name another: scene"),
        ({"scene": SCENES, "label": ANIMALS}, {"label_column": ("scene",)}, ["outdoor", "indoor", "outdoor"], None),
        ({"scene": SCENES, "label": (WORDS, list("xyz"))}, {}, list("xyz"), "the labels are the column label of"),
        ({"animal": ANIMALS, "text": (WORDS, list("xyz"))}, {}, ["bird", "cat", "dog"], None),
        ({"a": ({"b": WORDS}, [{"b": k} for k in "xyz"])}, {"label_column": ("a.b",)}, list("xyz"), None),
        (
            {"cat": (INTEGERS, [1, 0, 1]), "dog": (FLOATS, [0.0, 1.0, 1.0])},
            {"label_column": ("cat", "dog")},
            [["cat"], ["dog"], ["cat", "dog"]],
            None,
        ),
    ],
)  # fmt: skip
def test_the_column_of_labels_is_chosen_and_said(tmp_path, columns, options, read, note):
    source = open_named(write_columns(tmp_path / "set", image=PICTURES, **columns), columns=Columns(**options))
    assert labels_of(source) == read
    assert note in source.notes[0] if note else not source.notes


@pytest.mark.parametrize(
    "columns, options, words",
    [
        ({"scene": SCENES, "animal": ANIMALS}, {}, "columns of labels, scene, animal; say which with --label_column"),
        ({"scene": SCENES}, {"label_column": ("scen",)}, "--label_column scen is no column of .* Did you mean 'scene'"),
        ({"text": (WORDS, list("xyz"))}, {}, "no column of labels; name one with --label_column. Its columns: .*text"),
        ({"label": ANIMALS}, {"image_column": "label"}, "--image_column label holds no images"),
        ({"label": ANIMALS}, {"image_column": "imge"}, "--image_column imge is no column of .* Did you mean 'image'"),
    ],
)  # fmt: skip
def test_columns_that_could_be_two_are_refused(tmp_path, columns, options, words):
    with pytest.raises(UserError, match=words):
        open_named(write_columns(tmp_path / "set", image=PICTURES, **columns), columns=Columns(**options))


def test_the_column_of_images_is_chosen_and_said(tmp_path):
    green = {"bytes": b"green", "path": None}
    both = {"mask": (datasets.Image(), [green] * 3), "image": PICTURES, "label": ANIMALS}
    source = open_named(write_columns(tmp_path / "set", **both))
    assert source.train.read(0) == IMAGE["bytes"] and "--image_column can name another: mask" in source.notes[0]
    named = open_named(str(tmp_path / "set"), columns=Columns(image_column="mask"))
    assert named.train.read(0) == b"green" and not named.notes
    two = {"mask": both["mask"], "photo": PICTURES, "label": ANIMALS}
    with pytest.raises(UserError, match="several columns of images, mask, photo; say which with --image_column"):
        open_named(write_columns(tmp_path / "two", **two))


def test_bytes_and_what_pandas_makes_of_images_are_images(tmp_path):
    struct = {"bytes": datasets.Value("binary"), "path": WORDS}
    root = write_columns(tmp_path / "pandas", image=(struct, [IMAGE] * 3), label=ANIMALS)
    assert open_named(root).train.read(1) == IMAGE["bytes"]
    data = datasets.Value("binary"), [IMAGE["bytes"]] * 3
    source = open_named(write_columns(tmp_path / "bytes", png=data, label=ANIMALS), columns=Columns(image_column="png"))
    assert source.train.read(1) == IMAGE["bytes"]


def write_shards(folder, *members):
    """WebDataset's files: each of `members` is one image's, endings and contents."""
    folder.mkdir()
    for split in ("train", "validation"):
        with tarfile.open(folder / f"{split}-000.tar", "w") as tar:
            for number, files in enumerate(members):
                for ending, data in {"jpg": IMAGE["bytes"], **files}.items():
                    entry = tarfile.TarInfo(f"{number:04}.{ending}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return str(folder)


@pytest.mark.parametrize(
    "members, options, read",
    [
        ([{"cls": b"3"}, {"cls": b"1\n"}, {"cls": b"-1"}], {}, ["3", "1"]),
        ([{"cls": b"cat\n"}, {"cls": b"dog"}], {}, ["cat", "dog"]),
        ([{"json": b'{"label": "cat", "n": 1}'}, {"json": b'{"label": "dog", "n": 0}'}], {}, ["cat", "dog"]),
        ([{"json": b'{"label": "cat", "n": 1}'}, {"json": b'{"label": "dog", "n": 0}'}],
         {"label_column": ("json.n",)}, ["1", "0"]),
        ([{"json": b'{"tags": ["a", "b"]}'}, {"json": b'{"tags": ["b"]}'}], {"label_column": ("json.tags",)},
         [["a", "b"], ["b"]]),
        ([{"txt": b"a"}, {"txt": b"b"}], {"label_column": ("txt",)}, ["a", "b"]),
    ],
)  # fmt: skip
def test_webdataset_shards(tmp_path, members, options, read):
    source = open_named(write_shards(tmp_path / "shards", *members), columns=Columns(**options))
    assert labels_of(source) == read
    assert source.train.read(0) == IMAGE["bytes"] and source.train.name(0) == "0000.jpg"


class Bomb:
    def __reduce__(self):
        return open, ("/nonexistent/exploded", "w")


def test_nothing_in_a_shard_is_unpickled(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(torch, "load", lambda *_, **__: started.append("torch"))
    monkeypatch.setattr(np, "load", lambda *_, **__: started.append("numpy"))
    bomb = pickle.dumps(Bomb())
    files = {ending: bomb for ending in ("pth", "pt", "pyd", "pickle", "pkl", "npy", "npz", "ten", "mp", "cbor")}
    source = open_named(write_shards(tmp_path / "shards", {"cls": b"0", **files}, {"cls": b"1", **files}))
    assert labels_of(source) == ["0", "1"] and not started


@pytest.mark.parametrize("streaming", [False, True])
def test_a_null_image_is_a_bad_file(tmp_path, loaders, streaming):
    root = write_table(tmp_path / "set", [IMAGE, None, *[IMAGE] * 4], [0, 1, 2, 0, 1, 2], LABELS, CARD)
    options = {"data_dir": None, "dataset_name": root, "streaming": streaming, "max_bad_files": 1}
    ours = loaders(options, plan=BatchPlan(2))
    assert [len(batch["index"]) for batch in ours.train.epoch(0)] == [2, 2, 2]
    assert sum(len(batch["index"]) for batch in ours.val.epoch()) == 5
    (name,) = ours.val.bad_files.names
    assert name == ("image 1 of the stream" if streaming else "row 1")


@pytest.mark.parametrize("label", [None, -1])
def test_a_stream_leaves_out_images_without_a_label_and_says_so_once(tmp_path, label, caplog):
    root = write_table(tmp_path / "set", [IMAGE] * 3, [0, label, 1], LABELS, CARD)
    split = open_named(root, streaming=True).train
    for _ in range(2):
        assert [number for _, number in split.read(0, 1)] == [0, 1]
    assert caplog.text.count("split train of") == caplog.text.count("images without a label: they are left out") == 1


@pytest.mark.parametrize("label", [None, -1])
def test_a_stream_without_labels_is_refused_before_it_is_read(tmp_path, label):
    root = write_table(tmp_path / "set", [IMAGE] * 3, [label] * 3, LABELS, CARD)
    with pytest.raises(UserError, match="split validation of .* has no labels: none of its first 3 images has one"):
        open_named(root, streaming=True, train=False)


def test_a_label_of_no_class_ends_a_stream(tmp_path):
    split = open_named(write_table(tmp_path / "set", [IMAGE] * 3, [0, 1, 2], LABELS, CARD), streaming=True).train
    split._mapping = split._mapping[:2]
    with pytest.raises(UserError, match="has an image whose label is 2, which is no class of it"):
        list(split.read(0, 1))


@pytest.mark.parametrize("options", [{"problem_type": MULTI}, {"label_separator": ";"}, {"label_column": ("a", "b")}])
def test_a_stream_of_several_labels_is_refused(tmp_path, options):
    columns = {"image": PICTURES, "label": ANIMALS, "a": ANIMALS, "b": ANIMALS}
    with pytest.raises(UserError, match="--streaming reads one label per image"):
        open_named(write_columns(tmp_path / "set", **columns), streaming=True, columns=Columns(**options))


def test_a_stream_with_gaps_trains_as_long_and_validates_what_has_a_label(tmp_path, loaders):
    root = write_table(tmp_path / "set", [IMAGE] * 6, [0, -1, 2, 0, 1, 2], LABELS, CARD)
    ours = loaders({"data_dir": None, "dataset_name": root, "streaming": True}, plan=BatchPlan(2))
    labels = [label for batch in ours.train.epoch(0) for label in batch["labels"].tolist()]
    assert len(labels) == 6 and sorted(labels[:5]) == [0, 0, 1, 2, 2]
    assert [label for batch in ours.val.epoch() for label in batch["labels"].tolist()] == [0, 2, 0, 1, 2]


def test_a_stream_that_breaks_is_one_sentence(name, monkeypatch):
    split = open_named(name, streaming=True).train

    class Broken:
        def __iter__(self):
            yield {"image": IMAGE, "label": 0}
            raise ConnectionResetError("the \x1b[31mpeer\nleft")

    split._dataset = Broken()
    with pytest.raises(UserError, match=r"the stream of --dataset_name .* broke: the \\x1b\[31mpeer\.$"):
        list(split.read(0, 1))


def test_an_error_without_words_is_named(monkeypatch):
    def fail(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="--dataset_name x/y cannot be loaded: NotImplementedError"):
        open_named("x/y")


def test_columns_that_are_missing_are_named(tmp_path):
    (tmp_path / "words").mkdir()
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    for split in ("train", "validation"):
        table.to_parquet(tmp_path / "words" / f"{split}.parquet")
    with pytest.raises(
        UserError, match="has no column of images; name one with --image_column. Its columns: text, label"
    ):
        open_named(str(tmp_path / "words"))


def test_streams_give_the_same_batches_with_any_number_of_workers(loaders, name):
    options = {"data_dir": None, "dataset_name": name, "streaming": True, "augmentation": "autoaugment"}
    runs = {}
    for workers in (0, 1, 2):
        ours = loaders({**options, "num_workers": workers}, plan=BatchPlan(4, accumulation_steps=2))
        assert ours.train.updates_per_epoch == 4
        runs[workers] = pixels(ours.train.epoch(3))
        assert len(runs[workers]) == 8
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


def test_streams_resume_in_the_middle_and_shuffle_by_epoch(loaders, name):
    ours = loaders({"data_dir": None, "dataset_name": name, "streaming": True})
    whole = pixels(ours.train.epoch(1))
    assert same(whole[5:], pixels(ours.train.epoch(1, start_update=5)))
    assert not same(whole, pixels(ours.train.epoch(2)))
    assert same(whole, pixels(ours.train.epoch(1)))


def test_two_ranks_share_a_stream_and_validate_each_picture_once(loaders, name):
    options = {"data_dir": None, "dataset_name": name, "streaming": True}
    ranks = [loaders(options, plan=BatchPlan(4, world_size=2, rank=rank)) for rank in (0, 1)]
    trained = [[i for b in rank.train.epoch(0) for i in b["index"].tolist()] for rank in ranks]
    assert len(trained[0]) == len(trained[1]) == 16 and not set(trained[0]) & set(trained[1])
    validated = [b["pixel_values"] for rank in ranks for b in rank.val.epoch()]
    whole = torch.cat([b["pixel_values"] for b in loaders(options).val.epoch()])
    assert sorted(map(hash_of, torch.cat(validated))) == sorted(map(hash_of, whole))


def hash_of(picture):
    return picture.numpy().tobytes()


def test_a_rank_that_runs_dry_starts_over(tmp_path, loaders):
    root = write_parquet(tmp_path / "set", files=3)  # two ranks, three files: one of them gets 24 pictures, one 12
    ours = loaders({"data_dir": None, "dataset_name": root, "streaming": True}, plan=BatchPlan(4, world_size=2, rank=1))
    split = ours.train._plan.split

    class Short:
        def __len__(self):
            return 36

        def read(self, rank, world_size, seed):
            yield from list(split.read(rank, world_size, seed))[:3]

    plan = stream.StreamedTrainingPlan(36, 4, 0, 1, 2, 1, split=Short())
    assert [len(request.indices) for request in plan.requests(0)] == [4] * 4

    class Empty(Short):
        def read(self, *_):
            return iter(())

    with pytest.raises(UserError, match="rank 1 of 2 gets no images from this stream"):
        list(stream.StreamedTrainingPlan(36, 4, 0, 1, 2, 1, split=Empty()).requests(0))


def test_a_bad_picture_of_a_stream_is_replaced_from_its_micro_batch(tmp_path, loaders):
    root = write_parquet(tmp_path / "set")
    features = datasets.Features({"image": datasets.Image(), "label": LABELS})
    table = [row for i, row in enumerate(rows(0, 36)) if i != 7]
    table.append({"image": {"bytes": b"nonsense", "path": "seven.jpg"}, "label": 1})
    for path in (tmp_path / "set" / "data").glob("train*"):
        path.unlink()
    datasets.Dataset.from_list(table, features=features).to_parquet(
        tmp_path / "set" / "data" / "train-00000-of-00001.parquet"
    )
    ours = loaders({"data_dir": None, "dataset_name": root, "streaming": True, "max_bad_files": 1})
    batches = list(ours.train.epoch(0))
    assert ours.train.bad_files.names == ["seven.jpg"] and all(len(b["index"]) == 4 for b in batches)


@pytest.mark.parametrize("bad", [0, 7, 35])
def test_a_micro_batch_of_one_bad_picture_of_a_stream_is_replaced_by_a_neighbour(tmp_path, loaders, bad):
    images = [{"bytes": b"nonsense" if i == bad else encode(photo(i, 30, 30), "JPEG"), "path": None} for i in range(36)]
    root = write_table(tmp_path / "set", images, [i % 3 for i in range(36)], LABELS, CARD)
    ours = loaders({"data_dir": None, "dataset_name": root, "streaming": True}, plan=BatchPlan(1))
    batches = pixels(ours.train.epoch(0))
    assert [index for index, _ in batches] == [[i] for i in range(36)] and ours.train.bad_files.count == 1
    assert same(batches[20:], pixels(ours.train.epoch(0, start_update=20)))


def test_neighbours_are_those_of_an_uninterrupted_run(name):
    split = open_named(name, streaming=True).train
    plan = stream.StreamedTrainingPlan(36, 3, 0, 1, 2, 1, split=split)
    whole = list(plan.requests(0))
    for start in range(len(whole)):
        for resumed, request in zip(plan.requests(0, start), whole[start:], strict=True):
            assert resumed.indices.tolist() == request.indices.tolist()
            assert resumed.split._samples.keys() == request.split._samples.keys()
    assert whole[0].indices.tolist() == [1, 3, 5] and len(whole[0].split._samples) == 11
    assert whole[-1].indices.tolist() == [31, 33, 35] and max(whole[-1].split._samples) == 35


def test_reading_ahead_keeps_order_and_runs_ahead():
    done = []

    def numbers():
        for i in range(10):
            done.append(i)
            yield i

    ahead = read_ahead(numbers(), depth=3)
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(done) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 4 <= len(done) <= 6
    assert list(ahead) == list(range(1, 10))


def test_reading_ahead_passes_errors_on_and_stops_with_its_reader():
    def failing():
        yield 1
        raise OSError("gone")

    ahead = read_ahead(failing())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="gone"):
        next(ahead)
    endless = read_ahead(iter(int, 1))
    next(endless)
    endless.close()
    assert not any(thread.name == "read_ahead" for thread in threading.enumerate())


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="has no alarm")
def test_a_stream_that_never_answers_is_spoken_of_and_left_by_a_signal(monkeypatch, caplog):
    monkeypatch.setattr(stream, "_QUIET", 0.1)
    monkeypatch.setattr(stream, "_LEAVE", 0.2)
    answer = threading.Event()

    def silent():
        answer.wait(30)
        yield 1

    class Stopped(BaseException):
        pass

    def stop(*_):
        raise Stopped

    before = signal.signal(signal.SIGALRM, stop)
    started = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.35)
        with pytest.raises(Stopped):
            next(read_ahead(silent()))
    finally:
        signal.signal(signal.SIGALRM, before)
        answer.set()
    assert time.monotonic() - started < 3 and "nothing has been read from the stream" in caplog.text
