import signal
import threading
import time

import datasets
import pytest
import torch

from effnet_hf.data import BatchPlan, stream
from effnet_hf.data.labels import Columns
from effnet_hf.data.named_dataset import open_named
from effnet_hf.data.stream import read_ahead
from effnet_hf.errors import UserError

from .test_named_dataset import (
    ANIMALS,
    CARD,
    IMAGE,
    LABELS,
    MULTI,
    PICTURES,
    rows,
    write_columns,
    write_parquet,
    write_table,
)
from .torture import encode, photo


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("streamed"))


def pixels(batches):
    return [(batch["index"].tolist(), batch["pixel_values"]) for batch in batches]


def same(a, b):
    return len(a) == len(b) and all(i == j and torch.equal(x, y) for (i, x), (j, y) in zip(a, b))


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
