"""Ways for a weight stream to reach servers: a process group, shared memory, a folder."""

from sdpg_megatron.rollout.sglang.sinks.base import Failures, Sink
from sdpg_megatron.rollout.sglang.sinks.broadcast import BroadcastSink
from sdpg_megatron.rollout.sglang.sinks.disk import DiskSink
from sdpg_megatron.rollout.sglang.sinks.shared import SharedSink

__all__ = ["BroadcastSink", "DiskSink", "Failures", "SharedSink", "Sink"]
