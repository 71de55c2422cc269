#!/usr/bin/env bash
# lock.sh UV: the image's dependencies, with hashes, in the versions that the tests run with.
#
# image-cpu.txt is the image without the libraries that only a GPU needs (tests/node/stubs.py says
# how torch is imported without them): the node tests build that one, 4 GB smaller.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$1
gpu_only=(
    triton cuda-bindings nvidia-cublas nvidia-cuda-cccl nvidia-cuda-nvrtc nvidia-cudnn-cu13
    nvidia-cufft nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13
    nvidia-nvjitlink nvidia-nvshmem-cu13
)
lock() {
    "$uv" pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header \
        --python-version 3.11 --extra train --extra track -c requirements/dev.txt "$@" pyproject.toml
}
lock -o requirements/image.txt
lock "${gpu_only[@]/#/--no-emit-package=}" -o requirements/image-cpu.txt
