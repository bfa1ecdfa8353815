"""Weights between Hugging Face tensors and Megatron shards: one map per family, read in both directions."""

from sdpg_megatron.weights.folder import read_folder, write_folder
from sdpg_megatron.weights.load import check_values, load_shards, open_weights
from sdpg_megatron.weights.map import ExpertShare, hf_shapes, weight_map
from sdpg_megatron.weights.stream import Bucket, WeightStream, new_room

__all__ = [
    "Bucket",
    "ExpertShare",
    "WeightStream",
    "check_values",
    "hf_shapes",
    "load_shards",
    "new_room",
    "open_weights",
    "read_folder",
    "weight_map",
    "write_folder",
]
