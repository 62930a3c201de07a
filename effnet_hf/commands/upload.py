"""`--push_to_hub` and what goes with it, for the commands that write a folder."""

import argparse

from ..errors import UserError


def add_upload_flags(parser: argparse.ArgumentParser) -> None:
    """`--push_to_hub` and what goes with it; `check_upload_flags` refuses what makes no sense."""
    hub = parser.add_argument_group("upload")
    hub.add_argument("--push_to_hub", action="store_true", help="upload the folder when it is written")
    hub.add_argument("--hub_model_id", metavar="ME/X", help="repository, created if it does not exist")
    hub.add_argument("--hub_private", action="store_true", default=None, help="make a new repository private")
    hub.add_argument("--hub_revision", metavar="BRANCH", help="branch to push to")
    hub.add_argument("--hub_token", metavar="TOKEN", help="default: the one `hf auth login` stored, or HF_TOKEN")


def check_upload_flags(args: argparse.Namespace) -> None:
    if args.push_to_hub and not args.hub_model_id:
        raise UserError("--push_to_hub needs --hub_model_id ME/X.")
    refuse_without_push(args, "hub_model_id", "hub_private", "hub_revision")  # a token may be for reading


def refuse_without_push(args: argparse.Namespace, *flags: str) -> None:
    """Raises `UserError` where one of these is given, and nothing will be uploaded."""
    for flag in flags:
        if getattr(args, flag) is not None and not args.push_to_hub:
            raise UserError(f"--{flag} does nothing without --push_to_hub.")


def upload(args: argparse.Namespace, folder: str) -> str:
    """Pushes a folder as the flags say; returns its address."""
    from ..hub import push_folder

    return push_folder(
        folder, args.hub_model_id, private=args.hub_private, revision=args.hub_revision, token=args.hub_token
    )
