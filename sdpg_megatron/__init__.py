"""Self-Distilled Policy Gradient on Megatron-core."""

__version__ = "0.1.0"
