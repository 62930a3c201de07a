"""Training from shards in object storage: an S3 server (moto) and a web server on loopback."""

import functools
import http.server
import logging
import threading

import pytest


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """`parquet/` without a README.md, and `tar/` with the one that `cls` needs: 4 files of 9 images."""
    import io
    import tarfile

    import datasets

    from tests.data.test_named_dataset import CARD, rows, write_parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # it would keep from any download
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    write_parquet(tmp_path / "parquet", card=None, files=4)
    (tmp_path / "tar").mkdir()
    names = CARD.replace("name: image", "name: jpg").replace("name: label", "name: cls")
    own = "".join(f"  - name: {name}\n    dtype: string\n" for name in ("__key__", "__url__"))
    names = names.replace("  - name: jpg", f"{own}  - name: jpg")
    (tmp_path / "tar/README.md").write_text(names)
    for name, start, count in [(f"train-{i:04}", 9 * i, 9) for i in range(4)] + [("validation-0000", 100, 11)]:
        with tarfile.open(tmp_path / f"tar/{name}.tar", "w") as tar:
            for i, row in enumerate(rows(start, count), start):
                for end, data in (("jpg", row["image"]["bytes"]), ("cls", str(row["label"]).encode())):
                    member = tarfile.TarInfo(f"{i}.{end}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return tmp_path


@pytest.fixture
def s3(shards, monkeypatch):
    server_of = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = s3fs.S3FileSystem()
    bucket.makedirs("pictures")
    for kind in ("parquet", "tar"):
        bucket.put(str(shards / kind), f"pictures/{kind}", recursive=True)
    yield "s3://pictures"
    bucket.rm("pictures", recursive=True)  # moto would keep it, and the next `put` land in folders within its folders
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def web(shards):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(shards))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def check(address, shards, kind):
    """A stream has each image once by its label on one process and on two, and trains; so does what is copied first."""
    import torch

    from effnet_hf import EfficientNetNVImageProcessor
    from effnet_hf.data import BatchPlan, build_loaders
    from effnet_hf.recipes import load_recipe
    from effnet_hf.training import train
    from tests.training.workbench import cheap_training, small_recipe

    processor = EfficientNetNVImageProcessor.for_image_size(32)
    options = {"dataset_name": f"{address}/{kind}", "output_dir": str(shards / "none"), "mixup": 0.0}
    recipe = load_recipe("b0", **options, num_workers=0)

    def labels(plan, streaming):
        with build_loaders(recipe.replace(streaming=streaming), processor, plan) as loaders:
            assert loaders.class_names == ["bird", "cat", "dog"]
            listing = loaders.listing()
            return [
                torch.cat([batch["labels"] for batch in each]).tolist()
                for each in (loaders.train.epoch(0), loaders.val.epoch(0))
            ], listing, loaders.notes  # fmt: skip

    thirds = [n for n in (0, 1, 2) for _ in range(12)]
    (trained, validated), _, notes = labels(BatchPlan(4), True)
    assert sorted(trained) == thirds and len(validated) == 11 and not any("share evenly" in note for note in notes)
    both = [labels(BatchPlan(3, world_size=2, rank=rank), True) for rank in (0, 1)]
    assert sorted(both[0][0][0] + both[1][0][0]) == thirds
    assert sorted(both[0][0][1] + both[1][0][1]) == sorted(validated)
    assert any("1 file, which 2 processes cannot share evenly" in note for note in both[0][2])
    assert sorted(labels(BatchPlan(4), False)[0][0]) == thirds
    run = small_recipe(shards, shards / "run", epochs=1).replace(data_dir=None, dataset_name=f"{address}/{kind}")
    with cheap_training():
        assert train(run.replace(streaming=True)) == 0
        assert train(run.replace(streaming=True, epochs=2, resume="auto")) == 0


@pytest.mark.client("s3fs", "s3fs", "fsspec", "datasets", "moto", group="Data", step="`pip install s3fs`")
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_shards_in_s3(s3, shards, kind):
    check(s3, shards, kind)


@pytest.mark.client("web server with file lists", "fsspec", "datasets", "aiohttp", group="Data")
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_shards_behind_a_web_server(web, shards, kind):
    check(web, shards, kind)
