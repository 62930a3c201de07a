"""Loaded by `optimum-cli` when it starts (see `optimum/commands/optimum_cli.py` of Optimum): it then knows our models.

A folder of Optimum's namespace package (PEP 420), so it has no `__init__.py`. Whatever is missing here, `optimum-cli`
starts without our models: an error would take every command from it, for every model.
"""

import sys


try:
    import effnet_hf.export.optimum  # noqa: F401
except ModuleNotFoundError as error:
    # Optimum without its ONNX exporters is a usual installation, and then there is nothing to register with.
    if (error.name or "").split(".")[0] != "optimum":
        print(f"effnet_hf is not registered with Optimum: {error}", file=sys.stderr)
except Exception as error:
    print(f"effnet_hf is not registered with Optimum: {type(error).__name__}: {error}", file=sys.stderr)


REGISTER_COMMANDS: list = []
