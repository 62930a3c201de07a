"""Weights in every layout that a folder may have: each file is compared with the manifest, each tensor is read once."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification
from effnet_hf.checkpoint import open_checkpoint
from effnet_hf.errors import UserError
from effnet_hf.manifest import write_manifest


@pytest.fixture
def folder(tmp_path):
    config = EfficientNetNVConfig(
        image_size=16, kernel_sizes=[3], strides=[2], num_block_repeats=[1], expand_ratios=[2], out_channels=[16],
        stem_channels=16, head_channels=32, num_labels=2,
    )  # fmt: skip
    EfficientNetNVForImageClassification(config).save_pretrained(tmp_path)
    return tmp_path


def load(folder):
    return open_checkpoint(str(folder)).load()


def refusal(folder) -> str:
    with pytest.raises(UserError) as raised:
        load(folder)
    return str(raised.value)


def in_two_files(folder, change=lambda tensors: tensors):
    """Its tensors, half of them in a.safetensors and half in b.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for part, chosen in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file(change({name: tensors[name] for name in chosen}), folder / part)
    weight_map = {name: ("a", "b")[i % 2] + ".safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def test_weights_may_be_in_several_files_or_half_precision(folder):
    tensors = in_two_files(folder, lambda part: {n: t.half() if t.is_floating_point() else t for n, t in part.items()})
    state = load(folder).state_dict()
    assert all(torch.equal(state[name], tensor.half().to(tensor.dtype)) for name, tensor in tensors.items())
    assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.int64}


def test_a_tensor_in_two_files_is_refused(folder):
    tensors = in_two_files(folder)
    save_file(
        {**load_file(folder / "b.safetensors"), "classifier.bias": tensors["classifier.bias"] + 1},
        folder / "b.safetensors",
    )
    assert "does not say in which file classifier.bias is" in refusal(folder)


def old_pickle(folder, change=lambda tensors: tensors):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(change(tensors), folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "layout, name",
    [
        (in_two_files, "a.safetensors"),
        (in_two_files, "model.safetensors.index.json"),
        (old_pickle, "pytorch_model.bin"),
    ],
)
def test_every_file_of_weights_is_compared_with_the_manifest(layout, name, folder):
    layout(folder)
    write_manifest(folder)
    load(folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content + b" ")
    assert f"{name} has {len(content) + 1:,} bytes" in refusal(folder)


def test_weights_that_the_manifest_does_not_know(folder):
    layout = folder / "model.safetensors"
    content = layout.read_bytes()
    layout.unlink()
    write_manifest(folder)
    layout.write_bytes(content)
    in_two_files(folder)
    assert "is not in its manifest.json" in refusal(folder)


@pytest.mark.parametrize("key", [1, (1, 2), b"x"])
def test_an_old_file_whose_keys_are_no_names(key, folder):
    old_pickle(folder, lambda tensors: {**tensors, key: torch.ones(2)})
    assert "is not a dictionary of tensors by name" in refusal(folder)


def test_buffers_that_want_gradients_do_not_get_them(folder):
    old_pickle(folder, lambda tensors: {n: t.requires_grad_(t.is_floating_point()) for n, t in tensors.items()})
    network = deepcopy(load(folder))
    assert not any(buffer.requires_grad for buffer in network.buffers())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_network_without_a_classifier_is_loaded_with_a_new_one_only(folder):
    features = EfficientNetNVForImageClassification.from_pretrained(folder).efficientnet
    features.config.num_labels = 0
    features.save_pretrained(folder)
    assert "has no classifier, so it tells no classes; train one on its features" in refusal(folder)
    model = open_checkpoint(str(folder)).load(new_classifier=True, num_labels=3)
    assert model.classifier.out_features == 3
    assert all(
        torch.equal(tensor, features.state_dict()[key]) for key, tensor in model.efficientnet.state_dict().items()
    )
