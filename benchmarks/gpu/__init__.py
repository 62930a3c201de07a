"""What `gpu_check.py` runs: `runner` starts sections and merges what they write, `verify` and `runs` are sections."""
