"""Where in a file the network is: prefixes, classifiers of other names, several networks, shards, no classifier."""

import json
import sys

import pytest
import timm
import torch
from random_weights import assert_same, filled, pictures, random_state
from safetensors.torch import load_file, save_file

from effnet_hf import EfficientNetNVBackbone, EfficientNetNVConfig
from effnet_hf.cli import run
from effnet_hf.commands import convert
from effnet_hf.conversion import Converted, load_foreign, write_folder, write_foreign
from effnet_hf.conversion.dialect import expected_shapes
from effnet_hf.conversion.load import DIALECTS
from effnet_hf.conversion.nvidia import NVIDIA
from effnet_hf.conversion.timm import TIMM
from effnet_hf.conversion.torchvision import TORCHVISION
from effnet_hf.conversion.transformers import TRANSFORMERS
from effnet_hf.errors import UserError


CONFIG = EfficientNetNVConfig.from_variant("b0", num_labels=5)


@pytest.fixture(scope="module")
def ours():
    return random_state(CONFIG)


@pytest.fixture
def load(tmp_path):
    def save_and_load(content, **options):
        torch.save(content, tmp_path / "x.pth")
        return load_foreign(tmp_path / "x.pth", **options)

    return save_and_load


def under(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


PREFIXES = ("module.", "net.", "ema_model.module.", "model._orig_mod.encoder.", "a.b.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_any_prefix_is_found_and_said(dialect, prefix, ours, tmp_path):
    spoken = DIALECTS[dialect]
    padding = spoken.paddings[0]
    config = EfficientNetNVConfig.from_variant("b0", num_labels=5, padding=padding)
    folder = tmp_path / "x"
    folder.mkdir()
    save_file(under(prefix, spoken.write(ours, config)), folder / "model.safetensors")
    if dialect == "effnet_hf":
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
    found = load_foreign(folder, arch="efficientnet_b0" if dialect == "timm" else None)
    assert (found.dialect, found.config.num_labels, found.exact) == (dialect, 5, True)
    assert_same(found.state_dict, ours)
    assert f"The names begin with {prefix}, which was taken off." in found.notes


@pytest.mark.parametrize("head", ["head.", "fc.", "net.head.", "backbone.fc."])
def test_a_classifier_of_another_name_is_the_one_layer_besides(head, ours, load):
    theirs = NVIDIA.write(ours, CONFIG)
    wrapped = {
        head + key.removeprefix("classifier.fc.") if key.startswith("classifier.fc.") else f"backbone.{key}": tensor
        for key, tensor in theirs.items()
    }
    found = load(wrapped)
    assert_same(found.state_dict, ours)
    assert any(note.startswith(f"{head[:-1]} was taken for the classifier") for note in found.notes)


def test_what_else_lies_beside_it_is_refused_or_left_out_by_flag(ours, load):
    wrapped = {**under("model.", NVIDIA.write(ours, CONFIG)), "criterion.weight": torch.ones(5)}
    with pytest.raises(UserError, match="1 unexpected criterion.weight.* --prefix model leaves it out"):
        load(wrapped)
    found = load({**wrapped, "counts.seen": torch.tensor([3])}, prefix="model")
    assert_same(found.state_dict, ours)
    assert any("Left out what is not under model.: counts.seen, criterion.weight" in note for note in found.notes)


def test_of_several_networks_one_is_chosen_by_flag(ours, load):
    theirs, other = NVIDIA.write(ours, CONFIG), NVIDIA.write(random_state(CONFIG, seed=1), CONFIG)
    both = {"state_dict": {**under("student.", theirs), **under("teacher.", other)}}
    with pytest.raises(UserError, match=r"holds 2 networks, under student\. and teacher\.; choose one with --prefix"):
        load(both)
    assert_same(load(both, prefix="student.").state_dict, ours)
    assert_same(load(both, prefix="teacher").state_dict, random_state(CONFIG, seed=1))
    assert_same(load({"student": theirs, "teacher": other, "epoch": 3}, prefix="student").state_dict, ours)
    with pytest.raises(UserError, match=r"No EfficientNet that we know under pupil\."):
        load(both, prefix="pupil")


@pytest.mark.parametrize("plain, average", [("model.", "ema_model.module."), ("", "ema."), ("net.", "net.swa.")])
def test_of_a_network_and_its_average_the_flag_chooses(plain, average, ours, load):
    theirs, other = NVIDIA.write(ours, CONFIG), NVIDIA.write(random_state(CONFIG, seed=1), CONFIG)
    count = {average.replace("module.", "") + "n_averaged": torch.tensor(7)}
    both = {"state_dict": {**under(plain, theirs), **under(average, other), **count}, "epoch": 2}
    found = load(both)
    assert_same(found.state_dict, ours)
    assert any("--ema takes the averaged one" in note for note in found.notes)
    averaged = load(both, ema=True)
    assert_same(averaged.state_dict, random_state(CONFIG, seed=1))
    assert averaged.trainer_state is None


@pytest.mark.parametrize("container", ["net", "weights", "generator"])
def test_a_container_of_any_name(container, ours, load):
    found = load({container: NVIDIA.write(ours, CONFIG), "step": 3, "optimizer": {"state": {}, "param_groups": []}})
    assert_same(found.state_dict, ours)


def test_a_backbone_and_a_head_in_containers_of_their_own(ours, load):
    theirs = NVIDIA.write(ours, CONFIG)
    head = {key.rpartition(".")[2]: theirs.pop(key) for key in list(theirs) if key.startswith("classifier.fc.")}
    assert_same(load({"backbone": theirs, "head": head}).state_dict, ours)


# Several files.


def shards(folder, state, name="model.safetensors"):
    folder.mkdir()
    ending, weight_map = name.rpartition(".")[2], {}
    for i in range(3):
        part = {key: tensor for j, (key, tensor) in enumerate(state.items()) if j % 3 == i}
        file = f"{name.rpartition('.')[0]}-{i + 1:05}-of-00003.{ending}"
        save_file(part, folder / file) if ending == "safetensors" else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_shards(name, ours, tmp_path):
    shards(tmp_path / "x", NVIDIA.write(ours, CONFIG), name)
    for source in (tmp_path / "x", tmp_path / "x" / f"{name}.index.json"):
        found = load_foreign(source)
        assert {key: tensor.sum() for key, tensor in found.state_dict.items()} == {
            key: tensor.sum() for key, tensor in ours.items()
        }
    next((tmp_path / "x").glob("*-00002-*")).unlink()
    with pytest.raises(UserError, match="there is no .*00002-of-00003"):
        load_foreign(tmp_path / "x")


def test_a_sharded_folder_of_ours_and_of_transformers(ours, tmp_path):
    Converted(CONFIG, ours, None, "effnet_hf", "source", None).model().save_pretrained(
        tmp_path / "ours", max_shard_size="5MB"
    )
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    assert_same(dict(sorted(load_foreign(tmp_path / "ours").state_dict.items())), dict(sorted(ours.items())))

    config = EfficientNetNVConfig.from_variant("b0", num_labels=5, padding="same")
    shards(tmp_path / "stock", TRANSFORMERS.write(ours, config))
    TRANSFORMERS.folder_config(config).save_pretrained(tmp_path / "stock")
    found = load_foreign(tmp_path / "stock")
    assert (found.dialect, found.exact) == ("transformers", True)
    write_folder(found, tmp_path / "converted")
    assert all(torch.equal(load_file(tmp_path / "converted/model.safetensors")[key], ours[key]) for key in ours)


# No classifier.


def test_a_network_of_features_stays_one(ours, tmp_path, monkeypatch, capsys):
    theirs = filled(timm.create_model, "efficientnet_b0", num_classes=5)
    theirs.reset_classifier(0)
    torch.save(under("net.", theirs.state_dict()), tmp_path / "x.pth")
    words = [str(tmp_path / "x.pth"), "--arch", "efficientnet_b0", "--output_dir", str(tmp_path / "features")]
    monkeypatch.setattr(sys, "argv", ["convert.py", *words])
    with pytest.raises(SystemExit) as stop:
        run(convert.main)
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "b0, no classifier, 224 x 224 px, the same function" in said
    assert "It has no classifier, and none was made up: a network of features." in said
    assert "AutoModel.from_pretrained(" in said
    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(tmp_path / "features", output_loading_info=True)
    assert type(model).__name__ == "EfficientNetNVModel" and not any(info.values())
    assert not any("classifier" in key for key in load_file(tmp_path / "features/model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(pictures(64)).pooler_output, theirs(pictures(64)), rtol=1e-4, atol=1e-4)
    again = load_foreign(tmp_path / "features")
    assert again.config.num_labels == 0 and again.dialect == "effnet_hf"
    with pytest.raises(UserError, match="has no classifier, and --to timm writes classifiers only"):
        write_foreign(again, "timm", tmp_path / "back.pth")


@pytest.mark.parametrize("spoken", [NVIDIA, TORCHVISION, TIMM])
def test_feature_maps_alone_become_a_backbone(spoken, ours, load, tmp_path):
    last = tuple(spoken.layers[name] + "." for name in ("efficientnet.head.conv", "efficientnet.head.bn", "classifier"))
    theirs = {key: tensor for key, tensor in spoken.write(ours, CONFIG).items() if not key.startswith(last)}
    found = load(under("encoder.", theirs), arch="efficientnet_b0" if spoken is TIMM else None)
    assert any("a backbone of feature maps" in note for note in found.notes)
    write_folder(found, tmp_path / "backbone")
    model = EfficientNetNVBackbone.from_pretrained(tmp_path / "backbone")
    assert_same(
        dict(model.state_dict()),
        {key.removeprefix("efficientnet."): ours[key] for key in ours if ".encoder." in key},
    )


def test_half_a_classifier_is_no_network_without_one(ours, load):
    theirs = NVIDIA.write(ours, CONFIG)
    del theirs["classifier.fc.weight"]
    with pytest.raises(UserError, match="1 missing classifier.fc.weight"):
        load(theirs)


def test_our_own_feature_model_converts(ours, tmp_path):
    from effnet_hf import EfficientNetNVModel

    EfficientNetNVModel(CONFIG).save_pretrained(tmp_path / "features")
    found = load_foreign(tmp_path / "features")
    assert found.config.num_labels == 0 and len(found.state_dict) == len(expected_shapes(CONFIG)) - 2
