"""Hugging Face tensors to Megatron shards and back: one map per family for both directions."""

from sdpg_megatron.weights.bucket import Bucket, allocate
from sdpg_megatron.weights.folder import FolderWriter, read_folder, write_folder
from sdpg_megatron.weights.load import check_values, load_shards, open_weights
from sdpg_megatron.weights.map import ExpertShare, hf_shapes, weight_map
from sdpg_megatron.weights.stream import WeightStream

__all__ = [
    "Bucket",
    "ExpertShare",
    "FolderWriter",
    "WeightStream",
    "allocate",
    "check_values",
    "hf_shapes",
    "load_shards",
    "open_weights",
    "read_folder",
    "weight_map",
    "write_folder",
]
