"""Libraries are silenced where they would talk over us, and nowhere else."""

import subprocess
import sys
import warnings

import pytest

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
    code = "import torch; from effnet_hf.quiet import quiet_profiler; quiet_profiler()\n"
    code += "with torch.profiler.profile(): torch.ones(1) + 1"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout + child.stderr == ""
