"""What transformers and its neighbours do with a checkpoint: open it, whole, in pieces, in halves, and classify."""

import numpy as np
import pytest
import torch
import transformers


TF = "Transformers"


def pixels(number=2, side=64):
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.client("AutoConfig, AutoModelForImageClassification", group=TF)
def test_auto_classes(folder, classifier):
    from transformers import AutoConfig, AutoModelForImageClassification

    model, report = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert AutoConfig.from_pretrained(folder).id2label == classifier.config.id2label
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(pixels()).logits, classifier(pixels()).logits, rtol=0, atol=1e-5)


@pytest.mark.client("AutoModel (features)", group=TF)
def test_features(folder):
    from transformers import AutoModel

    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert model.eval()(pixels()).pooler_output.shape == (2, getattr(model.config, "hidden_dim", 0))


@pytest.mark.client("AutoImageProcessor", group=TF)
def test_image_processor(folder, photo):
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    array = np.array(photo)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    prepared = [processor(each, return_tensors="pt").pixel_values for each in (photo, [photo, photo], array, tensor)]
    assert [tuple(each.shape) for each in prepared] == [(number, 3, 64, 64) for number in (1, 2, 1, 1)]
    assert all(torch.equal(each[0], prepared[0][0]) for each in prepared)


@pytest.mark.client("pipeline, image-classification", group=TF)
def test_pipeline(folder, photo):
    from transformers import pipeline

    classify = pipeline("image-classification", model=str(folder))
    answers = classify(photo, top_k=5)
    assert len(answers) == 5 and abs(sum(answer["score"] for answer in answers) - 1) < 1e-5
    for batch in classify([photo] * 3, batch_size=2, top_k=1):
        assert batch[0]["label"] == answers[0]["label"]


@pytest.mark.client("pipeline, image-feature-extraction", group=TF)
def test_feature_pipeline(folder, photo):
    from transformers import pipeline

    features = pipeline("image-feature-extraction", model=str(folder), pool=True)(photo)
    assert np.isfinite(features).all() and np.asarray(features).shape[0] == 1


@pytest.mark.client("ignore_mismatched_sizes, another number of classes", group=TF)
def test_new_head(folder):
    from transformers import AutoModelForImageClassification

    settings = {"num_labels": 3, "ignore_mismatched_sizes": True}
    model = AutoModelForImageClassification.from_pretrained(folder, **settings).eval()
    logits = model(pixels()).logits
    assert logits.shape == (2, 3) and logits.isfinite().all()


@pytest.mark.client("dtype: bfloat16, float16", group=TF)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder, dtype, classifier):
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        halves, whole = model(pixels().to(dtype)).logits, classifier(pixels()).logits
    assert halves.dtype == dtype
    torch.testing.assert_close(halves.float(), whole, rtol=0.05, atol=0.05 * whole.abs().max().item())


@pytest.mark.client("device_map, sharded checkpoints", "accelerate", group=TF)
def test_device_map_and_shards(folder, classifier, tmp_path):
    from transformers import AutoModelForImageClassification

    classifier.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "shards", device_map={"": "cpu"}).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(pixels()).logits, classifier(pixels()).logits, rtol=0, atol=1e-5)


@pytest.mark.client("disk_offload", "accelerate", group=TF)
def test_disk_offload(classifier, tmp_path):
    import copy

    from accelerate import disk_offload

    with torch.no_grad():
        expected = classifier(pixels()).logits
        model = disk_offload(copy.deepcopy(classifier), tmp_path / "off", execution_device=torch.device("cpu"))
        torch.testing.assert_close(model(pixels()).logits, expected)


@pytest.mark.client("gradient_checkpointing_enable", group=TF)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")
def test_gradient_checkpointing(classifier, side):
    """The gradients are the same, and batch norm's statistics move once a step."""
    import copy

    found = []
    for checkpointed in (False, True):
        model = copy.deepcopy(classifier).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if type(module).__name__ == "StochasticDepth":
                module.survival_prob = 1.0
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(pixels(), labels=torch.tensor([0, 1])).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
        found[-1] |= {name: buffer for name, buffer in model.named_buffers() if "running" in name}
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.client("output_hidden_states, return_dict=False", group=TF)
def test_outputs(classifier):
    with torch.no_grad():
        outputs = classifier(pixels(), output_hidden_states=True)
        plain = classifier(pixels(), return_dict=False)
    assert len(outputs.hidden_states) > 3 and isinstance(plain, tuple) and torch.equal(plain[0], outputs.logits)


@pytest.mark.client("num_parameters, get_memory_footprint", group=TF)
def test_utilities(classifier):
    assert classifier.num_parameters() == sum(parameter.numel() for parameter in classifier.parameters())
    assert classifier.get_memory_footprint() > 4 * classifier.num_parameters()


@pytest.mark.client(
    "evaluate.evaluator",
    "evaluate",
    group="Training",
    limit="evaluate 0.4.6 asks transformers for TFPreTrainedModel, which transformers 5 has no more",
)
@pytest.mark.skipif(transformers.__version__ >= "5", reason="evaluate 0.4.6 does not know transformers 5")
def test_evaluator(folder, photo, tmp_path, monkeypatch):
    import datasets
    import evaluate

    class Accuracy(evaluate.Metric):
        """The Hub's script of this name is not here; the evaluator's own path is."""

        def _info(self):
            features = datasets.Features(
                {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
            )
            return evaluate.MetricInfo(description="", citation="", features=features)

        def _compute(self, predictions, references):
            return {"accuracy": float(np.mean(np.array(predictions) == np.array(references)))}

    from transformers import pipeline

    classify = pipeline("image-classification", model=str(folder))
    images = datasets.Dataset.from_dict({"image": [photo] * 3, "label": [0, 1, 2]})
    images = images.cast_column("image", datasets.Image())
    names = classify.model.config.label2id
    settings = {"input_column": "image", "label_column": "label", "label_mapping": names}
    metric = Accuracy(cache_dir=str(tmp_path))
    results = evaluate.evaluator("image-classification").compute(classify, images, metric=metric, **settings)
    told = names[classify(photo, top_k=1)[0]["label"]]
    assert results["accuracy"] == sum(told == label for label in (0, 1, 2)) / 3
