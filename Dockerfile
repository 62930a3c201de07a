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
# The image's own torch, torchvision, triton and DALI stay: pip would replace them with builds for another CUDA. Listed as
# name==version, because `pip freeze` writes the files they were installed from (torch @ file:///...), which are gone.
# PIP_CONSTRAINT replaces the image's own list, which may pin what setup.cfg wants newer (modelopt, packaging).
RUN python -c 'import re; from importlib.metadata import distributions, version; \
kept = re.compile("torch|torchvision|(pytorch.)?triton|nvidia.dali.*", re.I); \
names = {found.name for found in distributions() if kept.fullmatch(found.name or "")}; \
print(*(f"{name}=={version(name)}" for name in sorted(names)), sep="\n")' > /tmp/keep.txt \
    && PIP_CONSTRAINT=/tmp/keep.txt pip install --editable '.[quant,onnx,tracking]' \
    && rm /tmp/keep.txt
USER 1000
ENV HOME=/tmp
CMD ["python", "train.py", "--help"]
