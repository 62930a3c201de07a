"""Data sets in object storage: `--dataset_name s3://bucket/set`, `gs://…`, `https://host/set`, what fsspec opens."""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import datasets
import fsspec
import yaml
from datasets.data_files import EmptyDatasetError, get_data_patterns
from datasets.utils import file_utils
from huggingface_hub import CardData, DatasetCard, DatasetCardData, try_to_load_from_cache

from ..errors import UserError, first_line, printable
from ..files import atomic_write


T = TypeVar("T")
S = TypeVar("S")
_AT_ONCE = 16  # files that are asked for what they say of themselves
# What file systems call a file's version or the time of its last change.
_VERSION = (
    *("ETag", "etag", "mtime", "created", "LastModified", "last_modified", "Last-Modified", "updated", "generation"),
    *("Content-MD5", "Digest", "modificationTime", "modify", "last_write_time"),
)
_WITH_USER = re.compile(
    r"(abfss?|wasbs?|az|s?ftp|ssh|smb|hdfs|webhdfs)://[^/@:]+@"
)  # a container's or user's name alone
_HUB_FILE = re.compile(r"hf://datasets/([^@]+)@([0-9a-f]{40})/(.+)")
_xopen = file_utils.xopen


def is_remote(name: str) -> bool:
    return "://" in name


def require_plain(name: str, flag: str) -> None:
    """Raises `UserError`, which does not repeat it, for an address with a password or a signature, and for a place
    that is no folder: what is read is named in logs, checkpoints and model cards."""
    if not is_remote(name):
        return
    for hop in name.split("::"):
        protocol, _, rest = hop.rpartition("://")
        host = rest.partition("/")[0]
        if "?" in rest or "@" in host and not _WITH_USER.match(hop):
            what = "a query (?…)" if "?" in rest else "a user or password before its host"
            raise UserError(
                f"{flag}: the address of the data has {what}, which the run's files and model card would show to"
                " everybody; leave it out. Give credentials to the client, e.g. in AWS_ACCESS_KEY_ID and"
                " AWS_SECRET_ACCESS_KEY, or"
                """ in fsspec's variables: FSSPEC_HTTPS='{"headers": {"Authorization": "Bearer …"}}'."""
            )
    if not protocol or not rest.strip("/"):
        raise UserError(f"{flag} {printable(name)} names no folder; give an address such as s3://bucket/set.")


def builder_of(name: str, config: str | None, cache_dir: str | None = None) -> datasets.DatasetBuilder:
    """`datasets.load_dataset_builder`, which knows folders and the Hub, and also for the address of a folder.

    Raises:
        UserError: nothing there is a file that `datasets` reads, or can be listed.
    """
    if is_remote(name):
        file_utils.xopen = _open
        name = _described_here(name)
    return datasets.load_dataset_builder(name, config, cache_dir=cache_dir)


def _open(file, *arguments, **options):
    """How `datasets` opens an archive of a stream. It asks for no blocks (4.8), which S3's file system takes for a word
    to its client, and raises; only those that know it are asked."""
    if not str(file).startswith(("http://", "https://", "hf://")):
        options.pop("block_size", None)
    return _xopen(file, *arguments, **options)


def _described_here(address: str) -> str:
    """A local folder with the README.md of a remote one in which all files have their whole address."""
    address = address.rstrip("/")
    fsspec.core.url_to_fs(address)[0].invalidate_cache()  # of what this process has listed before
    readme = f"{address}/README.md"
    card: CardData = DatasetCardData()
    with contextlib.suppress(FileNotFoundError), fsspec.open(readme, "r", encoding="utf-8") as file:
        text = file.read()
        try:
            card = DatasetCard(text).data
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"{readme} is not what the Hub calls a data set card: {first_line(error)}") from None
    configs = card.to_dict().get("configs")
    if not configs:
        try:
            patterns = get_data_patterns(address)
        except (EmptyDatasetError, FileNotFoundError):
            raise UserError(
                "there are no Parquet or .tar files, or they cannot be listed; README.md there may name them under"
                " `configs` and `data_files`."
            ) from None
        configs = [
            {"config_name": "default", "data_files": [{"split": str(k), "path": v} for k, v in patterns.items()]}
        ]
    if not isinstance(configs, list) or not all(isinstance(each, dict) for each in configs):
        raise UserError(
            f"{readme}: `configs` must be a list of configurations, each with `config_name` and `data_files`."
        )
    card["configs"] = [{**each, "data_files": _whole(address, each.get("data_files", "**"))} for each in configs]
    key = hashlib.blake2b(address.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    folder = os.path.join(datasets.config.HF_DATASETS_CACHE, "effnet_hf", "remote", key, os.path.basename(address))
    os.makedirs(folder, exist_ok=True)
    with atomic_write(os.path.join(folder, "README.md")) as file:
        file.write(f"---\n{card.to_yaml()}\n---\n")
    return folder


def _whole(address: str, files):
    """The `data_files` of a README.md: a pattern, several, or those of each split. They lie below its address: whoever
    writes there is not to choose what else of this machine, or with its credentials, is read."""
    if isinstance(files, str):
        whole = files if is_remote(files) else f"{address}/{files}"
        if not whole.startswith(f"{address}/") or "::" in files or ".." in whole.split("/"):
            raise UserError(f"{address}/README.md: `data_files` names {files}, which does not lie below {address}.")
        return whole
    if isinstance(files, dict):
        return {key: value if key == "split" else _whole(address, value) for key, value in files.items()}
    if not isinstance(files, list):
        raise UserError(f"{address}/README.md: `data_files` must be names of files, or of those of each split.")
    return [_whole(address, each) for each in files]


def of_each(ask: Callable[[T], S], files: Iterable[T]) -> Iterator[S]:
    """What each file says, in their order; many are asked at a time."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(ask, files)


def version(file: str) -> tuple:
    """What changes with a file of this machine or of an address; nothing where nobody says such a thing."""
    if file.startswith("hf://"):
        return ("its commit",)  # which `datasets` knows it by
    if not is_remote(file):
        found = os.stat(file)
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns  # `os.utime` sets no st_ctime
    fs, path = fsspec.core.url_to_fs(file.rpartition("::")[2])
    info = fs.info(path)
    told = [(key, str(info[key])) for key in _VERSION if info.get(key)]
    return (info.get("size"), *told) if told else ()


def copied(file: str) -> str:
    """The copy that `datasets` made of a file of the Hub; any other file is its own."""
    named = _HUB_FILE.fullmatch(file)
    found = named and try_to_load_from_cache(named[1], named[3], repo_type="dataset", revision=named[2])
    return found if isinstance(found, str) else file
