"""`--dataset_name` with the address of a folder; fsspec's file system in memory stands for a store of objects."""

import datasets
import fsspec
import pytest

from effnet_hf.data import BatchPlan, remote
from effnet_hf.data.named_dataset import open_named
from effnet_hf.data.remote import require_plain
from effnet_hf.errors import UserError

from .test_named_dataset import CARD, described, labels_of, write_parquet, write_split


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Three files of 12 pictures to train on and one of 11, without a README.md."""
    folder = write_parquet(tmp_path_factory.mktemp("shards"), card=None)
    store = fsspec.filesystem("memory")
    store.put(folder, "/set", recursive=True)
    yield store
    store.rm("/set", recursive=True)


def test_parquet_files_say_themselves_what_the_classes_are_and_how_many_images(loaders, stored):
    options = {"data_dir": None, "dataset_name": "memory://set", "streaming": True}
    ours = loaders(options)
    assert ours.class_names == ["bird", "cat", "dog"]
    assert (ours.train.num_samples, ours.val.num_samples) == (36, 11)
    assert (
        sorted(label for b in ours.train.epoch(0) for label in b["labels"].tolist()) == [0] * 12 + [1] * 12 + [2] * 12
    )
    assert not any("evenly" in note for note in ours.notes)


def test_files_that_processes_cannot_share_are_told_of(loaders, stored):
    options = {"data_dir": None, "dataset_name": "memory://set", "streaming": True}
    notes = loaders(options, plan=BatchPlan(4, world_size=3)).notes
    assert [note.partition(", which")[0] for note in notes if "evenly" in note] == [
        "split validation of memory://set has 1 file"
    ]
    notes = loaders(options, plan=BatchPlan(4, world_size=2)).notes
    (train, _) = [note for note in notes if "evenly" in note]
    assert "each reads all of them and keeps one image of 2" in train


@pytest.mark.parametrize("where", ["data/train-*", "memory://set/data/train-*"])
def test_its_readme_names_files_within_it_or_by_their_whole_address(stored, where):
    configs = f"configs:\n- config_name: some\n  data_files:\n  - {{split: train, path: ['{where}']}}\n"
    configs += "  - {split: test, path: data/validation-00000-of-00001.parquet}\n"
    stored.pipe("/set/README.md", CARD.replace("---\n", f"---\n{configs}", 1).encode())
    try:
        source = open_named("memory://set/", "some", streaming=True, val_split="test")
    finally:
        stored.rm("/set/README.md")
    assert (len(source.train), len(source.val)) == (36, 11)


def test_an_address_with_nothing_is_one_sentence():
    with pytest.raises(UserError, match="--dataset_name memory://none cannot be loaded: there are no Parquet or .tar"):
        open_named("memory://none", streaming=True)


def test_a_file_system_that_nothing_here_opens_is_one_sentence():
    with pytest.raises(UserError, match="--dataset_name nosuch://set cannot be loaded: Protocol not known: nosuch"):
        open_named("nosuch://set", streaming=True)


@pytest.fixture
def online(monkeypatch):
    """The suite is offline, and `datasets` then copies nothing from memory either."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("protocol, known", [("file", True), ("memory", True), ("memory", False)])
def test_a_file_that_was_replaced_is_read_again(protocol, known, online, tmp_path, monkeypatch):
    if not known:
        monkeypatch.setattr(remote, "_VERSION", ())
    store = fsspec.filesystem(protocol)
    address = str(tmp_path / "set") if protocol == "file" else "/replaced"

    def put(*labels):
        write_split(tmp_path / "0.parquet", labels, described("cat", "dog"))
        store.makedirs(address, exist_ok=True)
        for split in ("train", "validation"):
            store.pipe_file(f"{address}/{split}.parquet", (tmp_path / "0.parquet").read_bytes())
        source = open_named(f"{protocol}://{address}")
        assert any("neither an ETag nor a time" in note for note in source.notes) is not known
        return labels_of(source)

    assert (put(0, 1), put(1, 1)) == (["cat", "dog"], ["dog", "dog"])


@pytest.mark.parametrize("streaming", [False, True])
def test_files_whose_labels_have_another_order_are_refused_or_told_of(streaming, online, tmp_path):
    store = fsspec.filesystem("memory")
    for name, names in {"train-0": "ab", "train-1": "ba", "validation": "ab"}.items():
        write_split(tmp_path / f"{name}.parquet", [0, 1], described(*names))
        store.pipe_file(f"/order{streaming}/{name}.parquet", (tmp_path / f"{name}.parquet").read_bytes())
    with pytest.raises(UserError, match="its files train-0.parquet and train-1.parquet have different names"):
        open_named(f"memory://order{streaming}", streaming=streaming)
    if streaming:  # nothing else is asked of files whose number of images README.md says
        card = "dataset_info:\n  splits:\n  - {name: train, num_examples: 4}\n  - {name: validation, num_examples: 2}\n"
        store.pipe_file(f"/order{streaming}/README.md", f"---\n{card}---\n".encode())
        (told,) = [n for n in open_named(f"memory://order{streaming}", streaming=True).notes if "was asked" in n]
        assert told.startswith("of the 2 files of split train of memory://orderTrue only train-0.parquet was asked")


@pytest.mark.parametrize(
    "address, told",
    [
        ("https://me:secret@host/set", "a user or password before its host"),
        ("https://secret@host/set", "a user or password before its host"),
        ("s3://KEY:secret@bucket/set", "a user or password before its host"),
        ("abfs://me:secret@account.dfs.core.windows.net/set", "a user or password before its host"),
        ("simplecache::https://me:secret@host/set", "a user or password before its host"),
        ("https://host/set?X-Amz-Signature=secret", r"a query \(\?…\)"),
        ("file://", "names no folder"),
        ("file:///", "names no folder"),
        ("s3://", "names no folder"),
        ("://x", "names no folder"),
    ],
)
def test_an_address_with_a_secret_or_without_a_folder_is_refused(address, told):
    with pytest.raises(UserError, match=f"^--dataset_name.*{told}.*") as caught:
        open_named(address)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_an_address_with_a_secret_is_refused_where_it_is_not_even_read(loaders):
    with pytest.raises(UserError, match="^--dataset_name: the address of the data has a user or password"):
        loaders({"data_dir": None, "dataset_name": "s3://KEY:secret@bucket/set", "loader": "synthetic"})


def test_addresses_that_name_a_container_or_a_user_are_no_secret():
    for address in ("abfs://images@account.dfs.core.windows.net/set", "sftp://me@host/set", "hf://datasets/me/x@v1"):
        require_plain(address, "--dataset_name")


BELOW = "which does not lie below memory://readme"


@pytest.mark.parametrize(
    "card, told",
    [
        ("configs: 3", "`configs` must be a list"),
        ("configs: [a]", "`configs` must be a list"),
        ("configs: [{config_name: a, data_files: 5}]", "`data_files` must be names"),
        ("configs: [", "is not what the Hub calls a data set card"),
        ("- 1", "is not what the Hub calls a data set card"),
        ("configs: [{config_name: a, data_files: 'file:///etc/*.parquet'}]", BELOW),
        ("configs: [{config_name: a, data_files: {train: ['memory://readme2/0.parquet']}}]", BELOW),
        ("configs: [{config_name: a, data_files: [{split: train, path: ../set/0.parquet}]}]", BELOW),
        ("configs: [{config_name: a, data_files: 'x::file:///etc/0.parquet'}]", BELOW),
    ],
)
def test_a_readme_that_says_nothing_or_names_other_places_is_one_sentence(card, told):
    store = fsspec.filesystem("memory")
    store.pipe_file("/readme/README.md", f"---\n{card}\n---\n".encode())
    with pytest.raises(UserError, match=f"cannot be loaded: memory://readme/README.md.*{told}[^\\n]*$"):
        open_named("memory://readme")


@pytest.mark.parametrize("address, asked", [("s3://bucket/0.tar", {}), ("https://host/0.tar", {"block_size": 0})])
def test_only_who_knows_it_is_asked_for_no_blocks(address, asked, monkeypatch):
    """`datasets` asks every file system, and S3's raises."""
    monkeypatch.setattr(remote, "_xopen", lambda file, mode, **options: options)
    assert remote._open(address, "rb", block_size=0) == asked
