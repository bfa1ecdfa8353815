"""Prompts that are read once on each machine: its first rank renders them, the others map what it has written."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdpg_megatron.data.dataset import PromptDataset
from sdpg_megatron.data.source import PromptSource
from sdpg_megatron.errors import SdpgError

if TYPE_CHECKING:
    from sdpg_megatron.mcore.parallel import Ranks

Prompts = tuple[PromptSource, PromptDataset | None]
"""To train on, and held out."""

TRAIN_FILE, EVAL_FILE = "train.arrow", "eval.arrow"


@dataclass(frozen=True, slots=True)
class _Offer:
    """What a rank has for the others on its machine."""

    machine: str
    folder: Path | None = None
    """None on ranks that have not read anything."""
    error: SdpgError | None = None


def share_prompts(ranks: Ranks, load: Callable[[], Prompts]) -> Prompts:
    """Call `load`, which reads files, on the first rank of each machine, and give all ranks there the same prompts.

    Every rank calls it.

    The files in between are in the machine's folder for temporary files, and are gone when this returns. A rank that
    cannot see the folder of its machine's first rank, as in another container, calls `load` itself.

    Raises:
        SdpgError: what `load` raised on any machine, on every rank; `WriteError` where the disk has no room.
    """
    with ExitStack() as stack:
        offer = _Offer(_machine())
        if os.environ.get("LOCAL_RANK", "0") == "0":
            try:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sdpg-prompts-")))
                _save(load(), folder)
                offer = _Offer(offer.machine, folder)
            except SdpgError as error:
                offer = _Offer(offer.machine, error=error)
        offers = ranks.gather_all(offer)
        for other in offers:
            if other.error is not None:
                raise other.error
        found = _open(offers, ranks.rank)
        ranks.barrier()  # no folder is removed before all have opened its files
    return found if found is not None else load()


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text(encoding='ascii').strip() if boot.exists() else ''}"


def _save(prompts: Prompts, folder: Path) -> None:
    train, held_out = prompts
    assert isinstance(train, PromptDataset)
    train.save(folder / TRAIN_FILE)
    if held_out is not None:
        held_out.save(folder / EVAL_FILE)


def _open(offers: Sequence[_Offer], rank: int) -> Prompts | None:
    """The prompts of the nearest rank before this one, or this one, on the same machine; None where there is none."""
    for offer in reversed(offers[: rank + 1]):
        if offer.folder is not None and offer.machine == offers[rank].machine and (offer.folder / TRAIN_FILE).exists():
            held_out = offer.folder / EVAL_FILE
            return PromptDataset.open(offer.folder / TRAIN_FILE), (
                PromptDataset.open(held_out) if held_out.exists() else None
            )
    return None
