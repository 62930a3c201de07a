"""Make a folder that the Hub's Spaces run as a web page: an image in, classes out.

effnet-hf space runs/b0 --output_dir space --examples shots/
effnet-hf space me/effnet-b0 --output_dir space --push_to_hub --hub_space_id me/what-is-it
"""

from ..cli import ArgumentParser, at_least, path, run
from ..errors import UserError
from .upload import refuse_without_push


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.old_spellings = {"--output": "--output_dir"}
    parser.add_argument(
        "model", nargs="?", type=path, help="checkpoint folder, which is copied, or Hub id, which the Space loads"
    )
    parser.add_argument("--model", dest="named", type=path, metavar="CHECKPOINT", help="the same")
    parser.add_argument("--output_dir", type=path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what this command wrote there before")
    page = parser.add_argument_group("the page")
    page.add_argument(
        "--examples", nargs="+", type=path, default=[], metavar="IMAGE", help="images, or folders of them, to offer"
    )
    page.add_argument("--title", metavar="TEXT", help="its heading; the model card's by default")
    page.add_argument("--top_k", type=at_least(1), default=5, help="classes to show")
    page.add_argument(
        "--hub_model_id", metavar="ME/X", help="load the model from this repository instead of copying a folder"
    )
    hub = parser.add_argument_group("upload")
    hub.add_argument("--push_to_hub", action="store_true", help="upload the folder as a Space when it is written")
    hub.add_argument("--hub_space_id", metavar="ME/Y", help="the Space, created if it does not exist")
    hub.add_argument("--hub_private", action="store_true", default=None, help="make a new Space private")
    hub.add_argument("--hub_token", metavar="TOKEN", help="default: the one `hf auth login` stored, or HF_TOKEN")
    args = parser.parse_args(argv)
    if (args.model is None) == (args.named is None):
        raise UserError("name one model: effnet-hf space MODEL --output_dir DIR.")
    if args.push_to_hub and not args.hub_space_id:
        raise UserError("--push_to_hub needs --hub_space_id ME/Y.")
    refuse_without_push(args, "hub_space_id", "hub_private", "hub_token")
    from ..hub import push_folder  # torch takes seconds
    from ..hub.space import GRADIO, write_space

    notes = write_space(
        args.model or args.named,
        args.output_dir,
        examples=args.examples,
        model_id=args.hub_model_id,
        title=args.title,
        top_k=args.top_k,
        overwrite=args.overwrite,
        shown=args.push_to_hub,
    )
    print(f"wrote    {args.output_dir}", *notes, sep="\n")
    print(f"next     pip install gradio=={GRADIO}; python {args.output_dir}/app.py")
    if args.push_to_hub:
        url = push_folder(
            args.output_dir, args.hub_space_id, private=args.hub_private, token=args.hub_token, space_sdk="gradio"
        )
        print(f"pushed   {url}")


if __name__ == "__main__":
    run(main)
