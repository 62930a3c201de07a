"""A disk that fills up while a checkpoint is exported or converted: one line, and nothing is left, in every format."""

import resource
import subprocess

import pytest

from effnet_hf.conversion import load_foreign, write_folder, write_foreign
from effnet_hf.errors import UserError
from effnet_hf.export import export_model

from .conftest import make_checkpoint


SMALL = 32_768  # bytes; the network's weights alone are larger


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("full") / "model")


@pytest.fixture(params=["a full disk", "a limit on a file's size"])
def small_place(request, tmp_path):
    """A folder that has no room for a network."""
    place = tmp_path / "place"
    place.mkdir()
    if request.param == "a full disk":
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "none", place], capture_output=True)
        if mounted.returncode:
            pytest.skip("only root may mount a small disk")
        yield place
        subprocess.run(["umount", "-l", place], check=True)
    else:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, before[1]))
        yield place
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("settings", [{"format": "pt2"}, {"format": "onnx"}, {"format": "openvino"}], ids=str)
def test_an_export(settings, model, small_place):
    if settings["format"] == "openvino":
        pytest.importorskip("openvino", reason="needs the openvino extra")
    with pytest.raises(UserError, match="cannot write .*(No space left on device|File too large|Is the disk full)"):
        export_model(str(model), small_place / "out", num_images=2, **settings)
    assert not [path for path in small_place.iterdir() if not path.name.endswith(".lock")]


@pytest.mark.parametrize("target", ["out", "out.pth", "out.safetensors"])
def test_a_conversion(target, model, small_place):
    found = load_foreign(model)
    with pytest.raises(UserError, match="cannot write .*(No space left on device|File too large)"):
        if target == "out":
            write_folder(found, small_place / target)
        else:
            write_foreign(found, "timm", small_place / target, force=True)
    assert not [path for path in small_place.iterdir() if not path.name.endswith(".lock")]
