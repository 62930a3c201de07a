"""Run by test_loopback.py in a process of its own, because the Hub's address is read when huggingface_hub is imported.

Arguments: a name of a function below, a folder. Prints one JSON object.
"""

import json
import sys
from pathlib import Path


def push(folder: Path) -> dict:
    """Everything push_folder and download can meet, one after the other."""
    from effnet_hf.errors import UserError
    from effnet_hf.hub import download, push_folder

    def attempt(function, *args, **kwargs):
        try:
            return str(function(*args, **kwargs))
        except UserError as error:
            return f"UserError: {error}"

    answers = {
        "pushed": attempt(push_folder, folder, "me/x", private=True, token="hf_writer"),
        "branch": attempt(push_folder, folder, "me/x", revision="v1", token="hf_writer"),
        "short name": attempt(push_folder, folder, "y", token="hf_writer"),
        "no token": attempt(push_folder, folder, "me/z", private=True, token=False),
        "reader": attempt(push_folder, folder, "me/z", revision="v1", token="hf_reader"),
        "bad name": attempt(push_folder, folder, "me/a/b", token="hf_writer"),
        "public": attempt(push_folder, folder, "me/public", private=True, token="hf_writer"),
        "no card": attempt(push_folder, folder / "checkpoints", "me/bad-card", token="hf_writer"),
        "missing": attempt(download, "me/none", token="hf_reader"),
        "private": attempt(download, "me/x", token=False),
        "no revision": attempt(download, "me/x", revision="v9", token="hf_reader"),
    }
    fetched = Path(download("me/x", revision="v1", token="hf_reader", patterns=["*.json", "*.safetensors"]))
    answers["fetched"] = sorted(path.name for path in fetched.iterdir())
    return answers


def push_twice(folder: Path) -> dict:
    from effnet_hf.errors import UserError
    from effnet_hf.hub import push_folder

    answers = {}
    for time in ("first", "second"):
        try:
            answers[time] = push_folder(folder, "me/flaky", private=True, revision="v1", token="hf_writer")
        except UserError as error:
            answers[time] = f"UserError: {error}"
    return answers


def push_all(folder: Path) -> dict:
    """Both, of the folders of these names: one process imports for two."""
    return {function.__name__: function(folder / function.__name__) for function in (push, push_twice)}


def open_remote(folder: Path) -> dict:
    """What a user does who has never heard of effnet_hf."""
    sys.modules["effnet_hf"] = None
    import torch
    from PIL import Image
    from transformers import AutoBackbone, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

    picture = Image.open(folder / "picture.png")
    processor = AutoImageProcessor.from_pretrained("me/x", trust_remote_code=True)
    pixels = processor(picture, return_tensors="pt")
    with torch.no_grad():
        model = AutoModelForImageClassification.from_pretrained("me/x", trust_remote_code=True).eval()
        base = AutoModel.from_pretrained("me/x", trust_remote_code=True).eval()
        backbone = AutoBackbone.from_pretrained("me/x", trust_remote_code=True, out_features=["stage1", "stage3"])
        return {
            "logits": model(**pixels).logits[0].tolist(),
            "pooled": list(base(**pixels).pooler_output.shape),
            "maps": [list(map_.shape) for map_ in backbone.eval()(**pixels).feature_maps],
            "pipeline": pipeline("image-classification", "me/x", trust_remote_code=True)(picture, top_k=5),
        }


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
