"""Measure a checkpoint: `effnet-hf validate` from the root of a clone; see effnet_hf/commands/validate.py."""

from effnet_hf.commands import run_command


if __name__ == "__main__":
    run_command("validate")
