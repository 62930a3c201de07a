"""Loaded by `optimum-cli` when it starts (see `optimum/commands/optimum_cli.py` of Optimum): it then knows our models.

A folder of Optimum's namespace package (PEP 420), so it has no `__init__.py`.
"""

import effnet_hf.export.optimum  # noqa: F401


REGISTER_COMMANDS = []
