"""Libraries are silenced where they would talk over us, and nowhere else."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from effnet_hf import quiet
from effnet_hf.quiet import quiet_profiler


def test_profiler_does_not_warn_that_it_forgets_a_cycle():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet_profiler()
        # torch 2.11's words, whichever torch is installed; that two sentences touch is its own
        warnings.warn("Warning: Profiler clears events at the end of each cycle.Only events from", stacklevel=1)
        with pytest.raises(UserWarning, match="won't be using warmup"):
            warnings.warn("Profiler won't be using warmup, this can skew profiler results", stacklevel=1)


def test_profiler_of_the_installed_torch_says_nothing():
    """In a process of its own: its words depend on whether there was a profile before."""
    code = "import sys, torch, types\n"
    code += "sys.modules['effnet_hf'] = types.ModuleType('effnet_hf')  # without what it imports\n"
    code += f"sys.modules['effnet_hf'].__path__ = [{str(Path(quiet.__file__).parent)!r}]\n"
    code += "from effnet_hf.quiet import quiet_profiler; quiet_profiler()\n"
    code += "with torch.profiler.profile(): torch.ones(1) + 1"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout + child.stderr == ""
