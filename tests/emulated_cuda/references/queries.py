"""Questions that transformer_engine_torch answers without launching a kernel.

Answers csrc/extensions/misc.cpp and comm_gemm_overlap.cpp. The libraries that are asked are NVIDIA's own
(cuDNN's version) or emulated ones (cuBLASLt's, the streams' priorities), so that the bindings stay.
"""

from __future__ import annotations

from .registry import kept

kept(
    "get_cudnn_version", "get_stream_priority_range", "device_supports_multicast", "ubuf_built_with_mpi",
    "nvte_built_with_cublasmp",
)  # fmt: skip
