# Checked by a linter only: nobody has built it yet (see the README).
#
#   docker build -t effnet-hf .
#   docker run --rm --gpus all --ipc=host -v /data:/data effnet-hf \
#       accelerate launch --config_file accelerate_configs/1gpu_bf16.yaml train.py --config b0 --data_dir /data --output_dir /data/run
FROM nvcr.io/nvidia/pytorch:26.10-py3

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /workspace/effnet_hf
COPY --chown=1000:1000 . .
# The image's own torch, torchvision and DALI stay: pip would replace them with builds for another CUDA.
RUN pip freeze | grep -E '^(torch|torchvision|nvidia-dali[^=]*)(==| @)' > /tmp/keep.txt \
    && pip install --constraint /tmp/keep.txt --editable '.[quant,onnx,tracking]' \
    && rm /tmp/keep.txt
USER 1000
ENV HOME=/tmp
CMD ["python", "train.py", "--help"]
