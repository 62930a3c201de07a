"""Detectors and segmenters with a pretrained backbone in them: transformers' all, and torchvision's.

Each computes the backbone's own maps to 1e-5 of their largest value, with batch norm statistics for which its epsilon
matters; trains a step; and gives the same outputs after saving and opening again.
"""

import copy

import pytest
import torch
import transformers
from transformers import ResNetBackbone, ResNetConfig

from effnet_hf import EfficientNetNVBackbone, EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.detection import FeaturePyramid, load_backbone_weights


pytestmark = pytest.mark.filterwarnings("ignore")  # those of the detectors are not ours
FIVE = int(transformers.__version__.split(".")[0]) >= 5
STAGES = 4  # of strides 4, 8, 16 and 32, which segmenters take
# DETR and its kin of transformers 4 mean timm unless told otherwise.
NOT_TIMM = {} if FIVE else {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}
TEXT = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SMALL = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 8}
SMALL |= {"decoder_attention_heads": 8, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 6, "num_labels": 3}
RT = {"encoder_hidden_dim": 16, "encoder_in_channels": [40, 48, 56], "encoder_ffn_dim": 16, "d_model": 16}
RT |= {"encoder_attention_heads": 2, "decoder_in_channels": [16, 16, 16], "decoder_ffn_dim": 16, "decoder_layers": 2}
RT |= {"decoder_attention_heads": 2, "num_queries": 6, "num_denoising": 0, "num_labels": 3, "hidden_expansion": 0.5}
DEFORMABLE = SMALL | {"num_feature_levels": 3}
MASKS = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
MASKS |= {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 16, "num_queries": 6}
MASKS |= {"train_num_points": 50, "num_labels": 3}
ONE = {"hidden_dim": 64, "mask_dim": 64, "conv_dim": 64, "encoder_feedforward_dim": 16, "dim_feedforward": 16}
ONE |= {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 6, "num_labels": 3}
ONE |= {"text_encoder_width": 64, "text_encoder_num_layers": 1, "text_encoder_vocab_size": 60, "task_seq_len": 8}
ONE |= {"train_num_points": 50, "text_encoder_context_length": 8, "text_encoder_n_ctx": 2}
ONE |= {"query_dec_layers": 1, "is_training": True}
OMDET = {"use_timm_backbone": False, "backbone": None, "encoder_in_channels": [40, 48, 56], "encoder_hidden_dim": 32}
OMDET |= {"apply_layernorm_after_vision_backbone": False, "vision_features_channels": [32, 32, 32], "num_queries": 6}
OMDET |= {"text_projection_in_dim": 16, "text_projection_out_dim": 16, "class_embed_dim": 16, "decoder_num_heads": 2}
OMDET |= {"task_encoder_hidden_dim": 16, "decoder_hidden_dim": 32, "decoder_num_layers": 1, "eval_size": None}
OMDET |= {"encoder_attention_heads": 2, "encoder_dim_feedforward": 16, "decoder_dim_feedforward": 16}
OMDET |= {"text_config": TEXT | {"model_type": "clip_text_model", "projection_dim": 16}}
VIDEO = TEXT | {"type_vocab_size": 2, "max_img_size": 64, "visual_prompt_size": 8, "num_frames": 1}
# model, what its configuration says besides the backbone's, how many maps it takes, what else it is given.
FREEZING = {
    "DetrForObjectDetection": (SMALL | NOT_TIMM, 3, "boxes"),
    "DetrForSegmentation": (SMALL | NOT_TIMM, STAGES, "box masks"),
    "ConditionalDetrForObjectDetection": (SMALL | NOT_TIMM, 3, "boxes"),
    "DabDetrForObjectDetection": (SMALL | NOT_TIMM | {"hidden_size": 32}, 3, "boxes"),
    "TableTransformerForObjectDetection": (SMALL | NOT_TIMM, 3, "boxes"),
    "DeformableDetrForObjectDetection": (DEFORMABLE | NOT_TIMM, 3, "boxes"),
    "DetaForObjectDetection": (DEFORMABLE | {"two_stage": False, "assign_first_stage": False}, 3, ""),
    "RTDetrForObjectDetection": (RT, 3, "boxes"),
    "RTDetrV2ForObjectDetection": (RT, 3, "boxes"),
    "DFineForObjectDetection": (RT, 3, "boxes"),
    "Deimv2ForObjectDetection": (RT | {"encoder_type": "hybrid"}, 3, "boxes"),
    "PPDocLayoutV2ForObjectDetection": (RT | {"class_thresholds": [0.5] * 3, "class_order": [0, 1, 2]}, 3, ""),
    "PPDocLayoutV3ForObjectDetection": (RT | {"x4_feat_dim": 24}, STAGES, ""),
    "PPDocLayoutV4ForObjectDetection": (RT, 3, ""),
    "GroundingDinoForObjectDetection": (DEFORMABLE | {"max_text_len": 8, "text_config": TEXT}, 3, "words"),
    "MMGroundingDinoForObjectDetection": (DEFORMABLE | {"max_text_len": 8, "text_config": TEXT}, 3, "words"),
}
RCNN = ("FasterRCNN", "MaskRCNN", "KeypointRCNN")
LIVE = {
    "MaskFormerForInstanceSegmentation": ({"fpn_feature_size": 32, "mask_feature_size": 32}, STAGES, "masks"),
    "Mask2FormerForUniversalSegmentation": (MASKS, STAGES, "masks"),
    "OneFormerForUniversalSegmentation": (ONE, STAGES, "task masks"),
    "UperNetForSemanticSegmentation": (
        {"hidden_size": 16, "auxiliary_in_channels": 48, "num_labels": 3},
        STAGES,
        "map",
    ),
    "OmDetTurboForObjectDetection": (OMDET, 3, "tasks"),
    "TvpForVideoGrounding": (VIDEO, 1, "video"),
}


def _trained(model):
    """Statistics as after training, with variances of 1e-3, for which an epsilon of 1e-3 is not one of 1e-5."""
    torch.manual_seed(0)
    norms = [part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))
        for part in model.modules():
            if isinstance(part, torch.nn.Conv2d):
                conv = part
            elif part in norms:
                conv.weight *= (1e-3 / part.running_var.mean()).sqrt()
        model(torch.randn(4, 3, 64, 64))
    return model.eval()


def _stages(side, count):
    if side == "stock":
        return ["stem", "stage1", "stage2", "stage3", "stage4"][-count:]  # of strides 4, 4, 8, 16 and 32
    return ["stage2", "stage3", "stage4", "stage5"][-count:]


@pytest.fixture
def pretrained(side, tiny_config, tmp_path):
    """The folder of a pretrained network of 24, 40, 48 and 56 channels at the strides 4, 8, 16 and 32."""
    folder = tmp_path / side
    if side == "stock":
        sizes = {"embedding_size": 16, "hidden_sizes": [24, 40, 48, 56], "depths": [1, 1, 1, 1]}
        _trained(ResNetBackbone(ResNetConfig(layer_type="basic", **sizes))).save_pretrained(folder)
    else:
        table = {"kernel_sizes": [3] * 5, "strides": [1, 2, 2, 2, 2], "num_block_repeats": [1, 1, 2, 1, 1]}
        config = tiny_config(**table, expand_ratios=[1, 4, 4, 4, 4], out_channels=[16, 24, 40, 48, 56])
        _trained(EfficientNetNVForImageClassification(config)).save_pretrained(folder)
        EfficientNetNVImageProcessor.for_image_size(64).save_pretrained(folder)
    return folder


def _backbone(side, folder, count):
    kind = ResNetBackbone if side == "stock" else EfficientNetNVBackbone
    return kind.from_pretrained(folder, out_features=_stages(side, count)).eval()


def _inner(model):
    return next(part for part in model.modules() if isinstance(part, (ResNetBackbone, EfficientNetNVBackbone)))


def _with_weights(side, model, folder):
    if side == "stock":
        weights = ResNetBackbone.from_pretrained(folder).state_dict()
        _inner(model).load_state_dict({name: weights[name] for name in _inner(model).state_dict()})
        return model
    return load_backbone_weights(model, folder)


def _error(maps, wanted):
    return max(
        ((map_ - other).abs().max() / other.abs().max()).item() for map_, other in zip(maps, wanted, strict=True)
    )


def _inputs(kind):
    torch.manual_seed(1)
    pixels, classes = torch.randn(2, 3, 64, 64), [torch.tensor([0]), torch.tensor([1, 2])]
    boxes = [0.1 + 0.3 * torch.rand(len(each), 4) + torch.tensor([0.3, 0.3, 0, 0]) for each in classes]
    labels = [{"class_labels": each, "boxes": box} for each, box in zip(classes, boxes)]
    masks = [(torch.rand(len(each), 64, 64) > 0.5).float() for each in classes]
    match kind:
        case "boxes":
            return {"pixel_values": pixels, "labels": labels}
        case "box masks":
            return {"pixel_values": pixels, "labels": [each | {"masks": m} for each, m in zip(labels, masks)]}
        case "words":
            ids = torch.tensor([[101, 5, 1012, 7, 1012, 9, 1012, 102]] * 2) % 60
            return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        case "masks":
            return {"pixel_values": pixels, "mask_labels": masks, "class_labels": classes}
        case "task masks":
            words = {"task_inputs": torch.ones(2, 8, dtype=torch.long), "text_inputs": torch.ones(2, 4, 8).long()}
            return {"pixel_values": pixels, "mask_labels": masks, "class_labels": classes, **words}
        case "map":
            return {"pixel_values": pixels, "labels": torch.randint(0, 3, (2, 64, 64))}
        case "tasks":
            words = {"classes_input_ids": torch.ones(4, 8).long(), "classes_attention_mask": torch.ones(4, 8).long()}
            words |= {"tasks_input_ids": torch.ones(2, 8).long(), "tasks_attention_mask": torch.ones(2, 8).long()}
            return {"pixel_values": pixels, **words, "classes_structure": torch.tensor([2, 2])}
        case "video":
            # One video: transformers' TVP cannot add its positions to several.
            words = {"input_ids": torch.ones(1, 8).long(), "attention_mask": torch.ones(1, 8).long()}
            return {"pixel_values": pixels[:1, None], **words, "labels": torch.rand(3, 1)}
    return {"pixel_values": pixels}


def _tensors(output, found):
    for value in output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ():
        _tensors(value, found)
    if isinstance(output, torch.Tensor) and output.is_floating_point():
        found.append(output)
    return found


def _client(name):
    way, limit = "`load_backbone_weights(model, checkpoint)`", "cannot be opened where the package is not installed"
    mark = pytest.mark.client(f"transformers {name}", group="Detection", step=way, limit=limit)
    return pytest.param(name, marks=mark, id=name)


@pytest.mark.parametrize("name", [_client(name) for name in FREEZING | LIVE])
def test_detector_of_transformers(name, side, pretrained, tmp_path):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    kind = getattr(transformers, name)
    settings, count, given = (FREEZING | LIVE)[name]
    settings = copy.deepcopy(settings)
    alone = _backbone(side, pretrained, count)
    config = kind.config_class(backbone_config=alone.config, **settings)
    model = _with_weights(side, kind(config), pretrained).eval()
    inner, inputs = _inner(model), _inputs(given)
    norms = {type(part).__name__ for part in inner.modules() if hasattr(part, "running_var")}
    assert (norms == {"BatchNorm2d"}) == (name in LIVE)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = alone(pixels).feature_maps
        assert _error(inner(pixels).feature_maps, wanted) <= 1e-5

    outputs = model.train()(**inputs)
    loss = outputs.loss if getattr(outputs, "loss", None) is not None else sum(
        each.clamp(-10, 10).mean() for each in _tensors(dict(outputs), []) if each.requires_grad
    )  # fmt: skip
    loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    # Several of the stock detectors freeze the whole of a ResNet, by its name.
    assert side == "stock" or any(weight.grad is not None for weight in inner.parameters())

    model.eval().save_pretrained(tmp_path / "detector")
    again = kind.from_pretrained(tmp_path / "detector").eval()
    with torch.no_grad():
        torch.manual_seed(2)  # query and proposal noise of some
        before = _tensors(dict(model(**inputs)), [])
        torch.manual_seed(2)
        after = _tensors(dict(again(**inputs)), [])
        same = [
            torch.allclose(one, other, 1e-4, 1e-5, equal_nan=True) for one, other in zip(before, after, strict=True)
        ]
        assert all(same)


# DETA has no such way.
@pytest.mark.skipif(FIVE, reason="transformers 5 has no use_pretrained_backbone")
@pytest.mark.parametrize("name", [name for name in FREEZING if name != "DetaForObjectDetection"])
@pytest.mark.client(
    "transformers 4, use_pretrained_backbone", group="Detection", step="", limit="no longer in transformers 5"
)
def test_pretrained_by_the_configuration(name, side, pretrained):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    settings, count, _ = copy.deepcopy(FREEZING[name])
    settings |= {"backbone": str(pretrained), "use_pretrained_backbone": True, "use_timm_backbone": False}
    settings |= {"backbone_kwargs": {"out_features": _stages(side, count)}}
    model = getattr(transformers, name)(getattr(transformers, name).config_class(**settings)).eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = _backbone(side, pretrained, count)(pixels).feature_maps
        assert _error(_inner(model)(pixels).feature_maps, wanted) <= 1e-5


@pytest.mark.parametrize("frozen_norm", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.client(f"torchvision {name}", "torchvision", group="Detection", step=way))
        for name, way in (
            *((name, '`FeaturePyramid.from_pretrained(checkpoint, "P2-P6")`') for name in RCNN),
            *((name, '`FeaturePyramid.from_pretrained(checkpoint, "P3-P7")`') for name in ("RetinaNet", "FCOS")),
            ("SSD", '`FeaturePyramid.from_pretrained(checkpoint, "P3-P7")`, and `head=SSDHead(…)`'),
        )
    ],
)
def test_detector_of_torchvision(name, frozen_norm, side, pretrained, tmp_path):
    from torchvision.models import detection

    alone = _backbone(side, pretrained, 4 if name in RCNN else 3)

    def make():
        pyramid = _pyramid(side, pretrained, name, frozen_norm)
        settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        if name == "SSD":
            boxes = detection.anchor_utils.DefaultBoxGenerator([[2]] * 5)
            head = detection.ssd.SSDHead([32] * 5, boxes.num_anchors_per_location(), 4)
            return detection.ssd.SSD(pyramid, boxes, (64, 64), 4, head=head, **settings), pyramid
        settings |= {"min_size": 64, "max_size": 64, "num_classes": 4}
        settings |= {"num_keypoints": 4} if name == "KeypointRCNN" else {}
        few = {"rpn_post_nms_top_n_train": 40, "rpn_post_nms_top_n_test": 40, "box_detections_per_img": 5}
        settings |= few if name in RCNN else {"topk_candidates": 40, "detections_per_img": 5}  # for time
        return getattr(detection, name)(pyramid, **settings), pyramid

    model, pyramid = make()
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    pixels = (torch.stack(images) - 0.5) / 0.5
    with torch.no_grad():
        pyramid.eval()
        wanted = alone(pixels).feature_maps
        assert _error(pyramid.body(pixels).feature_maps, wanted) <= 1e-5
        assert {map_.shape[1] for map_ in pyramid(pixels).values()} == {pyramid.out_channels}

    boxes, masks = torch.tensor([[4.0, 4, 40, 50], [20, 8, 60, 30]]), torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[:, 10:30, 10:30] = 1
    target = {"boxes": boxes, "labels": torch.ones(2).long(), "masks": masks, "keypoints": torch.full((2, 4, 3), 20.0)}
    losses = model.train()(images, [target] * 2)
    sum(losses.values()).backward()
    gradients = [weight.grad for weight in pyramid.body.parameters() if weight.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)

    torch.save(model.state_dict(), tmp_path / "detector.pt")
    again, _ = make()
    again.load_state_dict(torch.load(tmp_path / "detector.pt", weights_only=True))
    with torch.no_grad():
        for one, other in zip(model.eval()(images), again.eval()(images), strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)


def _pyramid(side, folder, name, frozen_norm):
    levels = "P2-P6" if name in RCNN else "P3-P7"
    if side == "ours":
        return FeaturePyramid.from_pretrained(folder, levels, 32, trainable_stages=3, frozen_norm=frozen_norm)
    from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

    class Pyramid(torch.nn.Module):
        """The stock model needs one written by hand."""

        def __init__(self):
            super().__init__()
            self.body, self.out_channels = _backbone(side, folder, 4 if name in RCNN else 3), 32
            extra = LastLevelMaxPool() if name in RCNN else LastLevelP6P7(32, 32)
            self.fpn = FeaturePyramidNetwork(self.body.channels, 32, extra)

        def forward(self, images):
            return self.fpn({str(level): map_ for level, map_ in enumerate(self.body(images).feature_maps)})

    pyramid = Pyramid()
    for part in list(pyramid.body.modules()) if frozen_norm else ():
        for child, norm in part.named_children():
            if isinstance(norm, torch.nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(norm.num_features)
                frozen.load_state_dict(norm.state_dict())
                setattr(part, child, frozen)
    return pyramid
