"""Train or fine-tune: `effnet-hf train` from the root of a clone; see effnet_hf/commands/train.py."""

from effnet_hf.commands import run_command


if __name__ == "__main__":
    run_command("train")
