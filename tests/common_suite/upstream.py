"""Imports transformers' own common tests from an unpacked source distribution, without its 500 sibling files.

The wheel has no tests and the source distribution only the top level of `tests/`; what those few files import from
elsewhere is stubbed here. None of it concerns a vision classifier: text generation, export, and the Hub cache.
"""

import importlib
import sys
import types
import unittest.mock
from pathlib import Path

import transformers


_STUBS = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    # values that ConfigTester passes through a configuration's common fields
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "architectures": ["BertModel"],
            "id2label": {0: "label"},
            "label2id": {"label": 0},
            "problem_type": "regression",
            "chunk_size_feed_forward": 5,
        }
    },
}


def load(folder: str) -> types.SimpleNamespace:
    """The modules `test_*_common.py` of the unpacked source distribution in `folder`."""
    tests = Path(folder).expanduser() / "tests"
    information = tests.parent / "PKG-INFO"
    if not information.is_file() or f"\nVersion: {transformers.__version__}\n" not in information.read_text():
        raise FileNotFoundError(
            f"{folder} is not the unpacked source distribution of transformers {transformers.__version__}, the one "
            "installed; tests/common_suite/fetch.py gets it."
        )
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(tests)]
    sys.modules["transformers_tests"] = package
    for name, contents in _STUBS.items():
        parent, _, _ = name.partition(".")
        sys.modules.setdefault(f"transformers_tests.{parent}", types.ModuleType(parent))
        stub = types.ModuleType(f"transformers_tests.{name}")
        vars(stub).update(contents)
        sys.modules[stub.__name__] = stub
    # transformers 5 takes pictures from a cache of its continuous integration
    cache = types.ModuleType("fetch_hub_objects_for_ci")
    cache.url_to_local_path = lambda url: url
    sys.modules.setdefault("fetch_hub_objects_for_ci", cache)
    names = ("modeling", "backbone", "configuration", "image_processing")
    # ConfigTester re-imports the library from the folder it stands in, which in the repository is the checkout's root
    with unittest.mock.patch("transformers.utils.direct_transformers_import", lambda path: transformers):
        modules = {name: importlib.import_module(f"transformers_tests.test_{name}_common") for name in names}
    return types.SimpleNamespace(**modules)
