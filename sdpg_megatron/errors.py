"""The errors a user can meet. Each names what was found, what was expected, and the fix."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


class SdpgError(Exception):
    """Base of every error that this package raises on purpose. All of them travel between ranks."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as they are: the default calls the constructor, which takes other arguments, with the message."""
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[SdpgError], args: tuple[object, ...], state: dict[str, object]) -> SdpgError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class ConfigError(SdpgError):
    """A field of the run's configuration cannot work."""

    field: str

    def __init__(self, field: str, found: object, expected: str, fix: str) -> None:
        super().__init__(f"{field}: found {found!r}, expected {expected}. Fix: {fix}")
        self.field = field

    @classmethod
    def of_text(cls, field: str, text: str) -> ConfigError:
        """Make an error with another form of message."""
        error = cls.__new__(cls, text)
        error.args = (text,)
        error.field = field
        return error

    @classmethod
    def joined(cls, errors: Sequence[ConfigError]) -> ConfigError:
        """One error that shows several, a line each; `field` is that of the first."""
        if len(errors) == 1:
            return errors[0]
        lines = [f"{len(errors)} errors", *map(str, errors)]
        return cls.of_text(errors[0].field, "\n  ".join(lines))


class DataError(SdpgError):
    """A row of a data file cannot be used."""

    def __init__(self, where: str, found: str, expected: str, fix: str) -> None:
        super().__init__(f"{where}: found {found}, expected {expected}. Fix: {fix}")
        self.where = where


class EvaluationError(SdpgError):
    """The results of an evaluation cannot be read, continued or compared."""

    def __init__(self, where: str, found: str, expected: str, fix: str) -> None:
        super().__init__(f"{where}: found {found}, expected {expected}. Fix: {fix}")


class WeightError(SdpgError):
    """A parameter has no counterpart, or does not have the shape of its counterpart."""


class CheckpointError(SdpgError):
    """A checkpoint cannot be read, or belongs to another run."""


class ConversionError(SdpgError):
    """A model cannot be brought into another format, or did not arrive as it was."""

    def __init__(self, where: str, found: object, expected: str, fix: str) -> None:
        super().__init__(f"{where}: found {found}, expected {expected}. Fix: {fix}")


class LaunchError(SdpgError):
    """The machines of a run cannot start it together."""

    def __init__(self, where: str, found: str, expected: str, fix: str) -> None:
        super().__init__(f"{where}: found {found}, expected {expected}. Fix: {fix}")

    @classmethod
    def said(cls, text: str) -> LaunchError:
        """What another machine found, in its words."""
        error = cls.__new__(cls, text)
        error.args = (text,)  # the constructor makes a message of its arguments
        return error


class OutputError(SdpgError):
    """Standard output does not take what a command prints."""

    def __init__(self, where: str, found: str, *, reader_ended: bool) -> None:
        super().__init__(f"{where}: found {found}, expected a stream that can be written. Fix: redirect it elsewhere")
        self.reader_ended = reader_ended
        """A pipe's reader has ended, as `head` does: nothing is wrong."""


class WriteError(SdpgError):
    """The disk refused a file that a run or an evaluation keeps beside checkpoints."""

    def __init__(self, where: str, found: str, free_mib: int, fix: str) -> None:
        super().__init__(
            f"{where}: could not be written: {found} ({free_mib} MiB free). What was saved before is untouched. "
            f"Fix: {fix}; the same command then continues from it"
        )


class RolloutError(SdpgError):
    """A rollout engine could not do what was asked of it."""


class ServerError(RolloutError):
    """A rollout server did not do what one request asked of it."""

    def __init__(self, url: str, call: str, found: str, *, retryable: bool = False) -> None:
        super().__init__(f"{url}{call}: {found}")
        self.url = url
        self.retryable = retryable
        """Whether the same request may succeed later, or elsewhere."""


class MismatchError(SdpgError):
    """Rollout engine and trainer give the same tokens log-probs that are too far apart."""

    def __init__(self, step: int, found: float, limit: float) -> None:
        super().__init__(
            f"step {step}: found a mean |log-prob in training - log-prob in rollout| of {found:.4g} nats, expected at "
            f"most {limit:g} (rollout.mismatch_limit). Fix: give both the same weights, dtype and temperature, and the "
            "server arguments that keep its numerics close; or, where the difference is understood, raise the limit"
        )


class FilterError(SdpgError):
    """A group filter of the user's did not say whether to keep a group."""

    def __init__(self, spec: str, uid: str, found: str) -> None:
        super().__init__(
            f"selection.filters: {spec} on the group of {uid}: found {found}, expected True or False. Fix: correct it"
        )
        self.spec = spec


class VerifierError(SdpgError):
    """A verifier fails on so many responses that rewards mean nothing."""

    def __init__(self, where: str, failures: int, calls: int, first: str, limit: float) -> None:
        share = f"at most {limit:.0%} of them" if limit < 1 else "at least one that does not fail"
        super().__init__(
            f"reward.verifier: {where}: found {failures} of {calls} calls that failed, the first {first}; expected "
            f"{share} (reward.failure_limit). Fix: correct the verifier, or raise the limit; the same command then "
            "continues from the last checkpoint"
        )


class NumericsError(SdpgError):
    """A quantity that training rests on is not finite."""


class SkippedStepsError(NumericsError):
    """Optimizer steps have been skipped too often in a row."""

    def __init__(self, step: int, count: int) -> None:
        super().__init__(
            f"optimizer step {step}: found {count} steps in a row whose loss or gradient is not finite, expected fewer "
            "than optimizer.skip_limit. All were skipped: the weights are those before. Fix: lower "
            "optimizer.lr or objective.beta; the same command with that change continues from the last checkpoint, as "
            "does the same command alone where the cause was elsewhere and is gone"
        )


class NonFiniteWeightsError(NumericsError):
    """A weight of the model is infinite or NaN."""

    def __init__(self, when: str, tensor: str) -> None:
        super().__init__(
            f"{when}: tensor {tensor!r}: found values that are not finite, expected finite numbers. These weights are "
            "neither published nor saved. Fix: continue from the last checkpoint with a lower optimizer.lr or "
            "optimizer.weight_decay, or start from another model"
        )


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The candidates most like `name`, best first; empty where nothing comes close."""
    return difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.5)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """``"did you mean 'a' or 'b'?"``, or the empty string where nothing comes close."""
    near = nearest(name, candidates)
    return f"did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


_FIXES = {
    errno.EROFS: "choose a path on a file system that is not read-only",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "choose a path without a loop of symbolic links",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space on the disk, or raise the quota"),
}


def reason_of(error: Exception) -> str:
    """An error's own words on one line; of one of the system's, its reason without number and path."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def fix_of(error: OSError, path: Path, *, reading: bool = False) -> str:
    """Fix for an `OSError` raised while writing, or reading, a path."""
    match error.errno:
        case errno.ENOENT if reading:
            missing = _first(path, lambda part: not _exists(part))
            return f"check the path: there is no {missing.name} in {missing.absolute().parent}"
        case errno.ENOENT:
            return f"make the folder {path.absolute().parent}"
        case errno.EISDIR:
            return f"name a file in the folder {path}" if reading else f"remove or rename the folder {path}"
        case errno.EEXIST | errno.ENOTDIR:
            obstacle = _first(path, lambda part: (part.is_symlink() or _exists(part)) and not part.is_dir())
            kind = "file" if _exists(obstacle) else "broken link"
            return f"remove or rename the {kind} {obstacle}, or choose another path"
        case errno.EACCES | errno.EPERM:
            what = "read" if reading else "write to"
            return f"get the right to {what} {_first_existing(path)}, or choose another path"
        case _:
            return _FIXES.get(error.errno or 0, "check the disk and its mount")


def _first(path: Path, found: Callable[[Path], bool]) -> Path:
    """The outermost part of a path of which `found` is true; the whole path where there is none."""
    return next((part for part in (*reversed(path.parents), path) if found(part)), path)


def _first_existing(path: Path) -> Path:
    """The innermost part of a path that exists."""
    return next((part for part in (path, *path.parents) if _exists(part)), path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # below a folder that cannot be entered
        return False
