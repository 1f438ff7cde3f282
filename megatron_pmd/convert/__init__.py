"""Hugging Face folders and megatron-core's checkpoints, one from the other, with proof."""

SIDE_FILES = "hf"
"""Folder inside a converted checkpoint: configuration and tokenizer, so that it converts back alone."""
