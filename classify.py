"""Classify images: `effnet-hf classify` from the root of a clone; see effnet_hf/commands/classify.py."""

from effnet_hf.commands import run_command


if __name__ == "__main__":
    run_command("classify")
