"""Models between Hugging Face folders and Megatron checkpoints, streamed and proven; and what a path holds."""
