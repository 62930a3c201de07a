"""Export to ONNX and others: `effnet-hf export` from the root of a clone; see effnet_hf/commands/export.py."""

from effnet_hf.commands import run_command


if __name__ == "__main__":
    run_command("export")
