"""Read prompts once on each machine: the first rank renders them to files, and the others map these."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdpg_megatron.data.dataset import PromptDataset
from sdpg_megatron.data.source import PromptSource
from sdpg_megatron.errors import DataError, SdpgError, WriteError
from sdpg_megatron.observe.files import free_mib

if TYPE_CHECKING:
    from sdpg_megatron.mcore.parallel import ParallelState

Prompts = tuple[PromptSource, PromptDataset | None]
"""Training prompts, and held-out prompts."""

TRAIN_FILE, EVAL_FILE = "train.arrow", "eval.arrow"


@dataclass(frozen=True, slots=True)
class _Offer:
    """Result of a rank for the others on its machine."""

    machine: str
    folder: Path | None = None
    """None on ranks that have not read the data."""
    error: SdpgError | None = None


def share_prompts(ranks: ParallelState, load: Callable[[], Prompts]) -> Prompts:
    """Call `load` on the first rank of each machine, and share its prompts with all ranks there. Every rank calls it.

    The prompts are exchanged through temporary files, which are removed before this returns. A rank that cannot read
    the files of its machine's first rank, for example in another container, calls `load` itself.

    Raises:
        SdpgError: on every rank, the error of `load` on any rank, or an unusable folder for temporary files.
    """
    with ExitStack() as stack:
        offer = _Offer(_machine())
        if os.environ.get("LOCAL_RANK", "0") == "0":
            try:
                folder = stack.enter_context(_scratch())
                _save(load(), folder)
                offer = _Offer(offer.machine, folder)
            except SdpgError as error:
                offer = _Offer(offer.machine, error=error)
        offers = ranks.gather_all(offer)
        _raise_first(other.error for other in offers)
        found, fault = None, None
        try:
            found = _open(offers, ranks.rank) or load()
        except SdpgError as error:
            fault = error
        _raise_first(ranks.gather_all(fault))  # also a barrier: a folder is removed after all have opened its files
    assert found is not None
    return found


def _raise_first(errors: Iterable[SdpgError | None]) -> None:
    for error in errors:
        if error is not None:
            raise error


@contextmanager
def _scratch() -> Iterator[Path]:
    """A new folder for temporary files. Raises `WriteError`."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="sdpg-prompts-", ignore_cleanup_errors=True)
    except OSError as error:
        place = Path(os.environ.get("TMPDIR") or tempfile.tempdir or "/tmp")
        fix = "set TMPDIR to a folder that can be written, with room for the prompts"
        raise WriteError(str(place), error.strerror or str(error), free_mib(place), fix) from error
    with folder as name:
        yield Path(name)


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
    """Open the prompts of the nearest rank up to this one on the same machine; None if there are none.

    Raises:
        DataError: the files cannot be read.
    """
    for offer in reversed(offers[: rank + 1]):
        if offer.folder is None or offer.machine != offers[rank].machine:
            continue
        train, held_out = offer.folder / TRAIN_FILE, offer.folder / EVAL_FILE
        try:
            if train.exists():
                return PromptDataset.open(train), PromptDataset.open(held_out) if held_out.exists() else None
        except (OSError, ValueError) as error:  # Arrow raises both
            expected = "the prompts written by this machine's first rank"
            fix = "set TMPDIR to a folder that all ranks of the machine can read, with room for the prompts"
            raise DataError(str(offer.folder), " ".join(str(error).split()), expected, fix) from error
    return None
