"""megatron-pmd: post-training of large language models by policy mirror descent."""

__version__ = "0.1.0"
