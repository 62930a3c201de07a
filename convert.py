"""Convert checkpoints: `effnet-hf convert` from the root of a clone; see effnet_hf/commands/convert.py."""

from effnet_hf.commands import run_command


if __name__ == "__main__":
    run_command("convert")
