"""Conversion between Hugging Face folders and Megatron checkpoints, streamed and verified; inspection of either."""
