"""Ways for a weight stream to reach servers: a process group, shared memory, a folder."""

from sdpg_megatron.rollout.transports.base import Failures, Sink
from sdpg_megatron.rollout.transports.broadcast import BroadcastSink
from sdpg_megatron.rollout.transports.disk import DiskSink
from sdpg_megatron.rollout.transports.shared import SharedSink

__all__ = ["BroadcastSink", "DiskSink", "Failures", "SharedSink", "Sink"]
