"""Quantize to int8: `effnet-hf qat` from the root of a clone; see effnet_hf/commands/qat.py."""

from effnet_hf.commands import run_command


if __name__ == "__main__":
    run_command("qat")
