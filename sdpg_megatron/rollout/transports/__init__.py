"""Transports of weights to servers: a process group, shared memory, a folder."""

from sdpg_megatron.rollout.transports.base import Failures, Transport
from sdpg_megatron.rollout.transports.broadcast import BroadcastTransport
from sdpg_megatron.rollout.transports.disk import DiskTransport
from sdpg_megatron.rollout.transports.shared import SharedMemoryTransport

__all__ = ["BroadcastTransport", "DiskTransport", "Failures", "SharedMemoryTransport", "Transport"]
