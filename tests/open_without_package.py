"""Run by test_remote_code.py in a process of its own: opens saved folders where `effnet_hf` does not exist.

Arguments: the folder with the checkpoints, a picture; writes what each door gives to `answers.pt` beside them.
"""

import sys


sys.modules["effnet_hf"] = None  # an installed copy must not help

from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)


root, picture = Path(sys.argv[1]), Image.open(sys.argv[2])
answers = {}

with torch.no_grad():
    for kind in ("classifier", "base", "backbone"):
        folder = str(root / kind)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
        pixel_values = processor(picture, return_tensors="pt").pixel_values
        base = AutoModel.from_pretrained(folder, trust_remote_code=True)
        classifier = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
        if transformers.__version__ < "5":
            backbone = AutoBackbone.from_pretrained(folder, trust_remote_code=True)
        else:  # AutoBackbone.from_pretrained opens no local folder of any model since transformers 5
            untrained = AutoBackbone.from_config(config, trust_remote_code=True)
            backbone = type(untrained).from_pretrained(folder)
        answers[kind] = {
            "modules": sorted({type(thing).__module__.split(".")[0] for thing in (config, processor, base, backbone)}),
            "pixel_values": pixel_values,
            "pooled": base.eval()(pixel_values).pooler_output,
            "maps": backbone.eval()(pixel_values).feature_maps,
            "logits": classifier.eval()(pixel_values).logits,
        }

    # What was opened this way can be saved again, and so on for ever.
    for kind, model in (("classifier", "AutoModelForImageClassification"), ("base", "AutoModel")):
        opened = getattr(transformers, model).from_pretrained(str(root / kind), trust_remote_code=True)
        opened.save_pretrained(root / f"{kind}-again")
        processor.save_pretrained(root / f"{kind}-again")
    again = AutoModelForImageClassification.from_pretrained(str(root / "classifier-again"), trust_remote_code=True)
    answers["again"] = again.eval()(answers["classifier"]["pixel_values"]).logits

    classify = pipeline("image-classification", model=str(root / "classifier"), trust_remote_code=True)
    answers["pipeline"] = classify(picture, top_k=5)

torch.save(answers, root / "answers.pt")
