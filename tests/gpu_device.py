"""Where tests marked `gpu` run: on CUDA; with EFFNET_HF_REHEARSE=1 on the CPU, to see that their lines would run."""

import os


REHEARSAL = bool(os.environ.get("EFFNET_HF_REHEARSE"))
DEVICE = "cpu" if REHEARSAL else "cuda"
