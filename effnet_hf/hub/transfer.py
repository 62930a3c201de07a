"""Fetching from and pushing to the Hub, through `huggingface_hub`; every failure is one line that says what to do."""

import shlex
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import UserError


# Not for the Hub: what only a resumed training needs (optimizer, random states), and pictures and names of the data.
_OF_A_RUN = ["checkpoints/*", "report/*", "plots/first_batch.png"]
# What a Space's folder may hold no more: it is removed there, too, unlike what somebody added by hand.
_OF_A_SPACE = ["examples/*", "model/*", "model_card.md"]
_LOCAL_ONLY = [".*", "*/.*", *_OF_A_RUN]
# HfHubHTTPError derives from the HTTP library's own root error: requests' before huggingface_hub 1.0, httpx' since.
_FAILURES: tuple[type[Exception], ...] = (OSError, HFValidationError, HfHubHTTPError.__mro__[1])


def download(
    repo_id: str, *, revision: str | None = None, token: str | bool | None = None, patterns: list[str] | None = None
) -> Path:
    """A local copy (the Hub's cache) of a repository's files that match `patterns`.

    Raises:
        UserError: no such repository or revision, no access, no network.
    """
    try:
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))
    except _FAILURES as error:
        raise UserError(f"Cannot fetch {repo_id} from the Hub: {_reason(error, revision)}") from error


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload with effnet_hf",
    space_sdk: str | None = None,
) -> str:
    """Uploads a checkpoint folder as one commit and returns its address; files that are there already are not sent
    again, so a second call continues an interrupted one.

    Args:
        folder: everything in it is uploaded, but hidden files, `checkpoints/`, and what shows images of a run's data:
            `report/` and `plots/first_batch.png`.
        repo_id: `"me/x"`; created if it does not exist, without a name before the slash under the token's owner.
        private: whether a new repository is private; by default what the owner's settings say.
        revision: branch to push to, created if it does not exist.
        token: a Hub token; by default the one `hf auth login` stored, or `HF_TOKEN`.
        space_sdk: upload it as a Space that runs on this, e.g. `"gradio"`, and not as a model; examples and a model
            that are there and not in `folder` are removed.

    Raises:
        UserError: the upload failed. The folder is untouched, and the message holds the command that tries again.
    """
    folder, api = Path(folder), HfApi(token=token)
    kind = "space" if space_sdk else "model"
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True, repo_type=kind, space_sdk=space_sdk).repo_id
        if private and not api.repo_info(repo_id, repo_type=kind).private:
            raise ValueError("it exists and is public, which its settings page can change")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=kind)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=kind,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            ignore_patterns=_LOCAL_ONLY,
            delete_patterns=_OF_A_SPACE if space_sdk else None,
        )
    except Exception as error:  # of the HTTP library, the storage client or the disk: the way out is the same
        again = ["hf", "upload", repo_id, str(folder), ".", *_each("--exclude", _OF_A_RUN)]
        again += (["--revision", revision] if revision else []) + (["--private"] if private else [])
        again += [*_each("--delete", _OF_A_SPACE), "--repo-type", kind] if space_sdk else []
        raise UserError(
            f"Upload to {repo_id} failed: {_reason(error, revision)} The result is safe in {folder}; "
            f"to upload it again: {shlex.join(again)}"
        ) from error
    return str(commit.commit_url).partition("/commit/")[0]


def _each(flag: str, patterns: list[str]) -> list[str]:
    """As `hf upload` takes them: up to huggingface_hub 0.36 all behind one flag, since 1.0 each behind its own."""
    if huggingface_hub.__version__.startswith("0."):
        return [flag, *patterns]
    return [word for pattern in patterns for word in (flag, pattern)]


def _reason(error: Exception, revision: str | None) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return "its owner wants you to ask for access, on its page."
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}."
    if status == 401 or isinstance(error, RepositoryNotFoundError):  # the Hub does not tell these apart
        return "it does not exist, or is private, or the token is not valid; `hf auth login` or HF_TOKEN gives one."
    if status == 403:
        return "the token does not allow it; a token that may write is made in the Hub's settings."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set."
    if isinstance(error, LocalEntryNotFoundError):
        return "no connection, and it is not in the cache."
    return " ".join(str(error or type(error).__name__).split()).rstrip(".") + "."
