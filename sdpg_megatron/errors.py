"""Error types for users. Messages name the value found, the expectation and the fix."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


class SdpgError(Exception):
    """Base class of all errors of this package. All of them can be pickled, to be sent between ranks."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the constructor: the default would call it with the message instead of its arguments."""
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[SdpgError], args: tuple[object, ...], state: dict[str, object]) -> SdpgError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class ConfigError(SdpgError):
    """Invalid field of the configuration, or of a model's files."""

    field: str

    def __init__(self, field: str, found: object, expected: str, fix: str) -> None:
        super().__init__(f"{field}: found {found!r}, expected {expected}. Fix: {fix}")
        self.field = field

    @classmethod
    def of_text(cls, field: str, text: str) -> ConfigError:
        """Create an error with a custom message."""
        error = cls.__new__(cls, text)
        error.args = (text,)
        error.field = field
        return error

    @classmethod
    def joined(cls, errors: Sequence[ConfigError]) -> ConfigError:
        """Combine several errors into one, one line each; `field` is the field of the first."""
        if len(errors) == 1:
            return errors[0]
        lines = [f"{len(errors)} errors", *map(str, errors)]
        return cls.of_text(errors[0].field, "\n  ".join(lines))


class DataError(SdpgError):
    """Invalid row or data file."""

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
    """A model cannot be converted, or the converted model differs."""

    def __init__(self, where: str, found: object, expected: str, fix: str) -> None:
        super().__init__(f"{where}: found {found}, expected {expected}. Fix: {fix}")


class LaunchError(SdpgError):
    """The machines of a run cannot start it together."""

    def __init__(self, where: str, found: str, expected: str, fix: str) -> None:
        super().__init__(f"{where}: found {found}, expected {expected}. Fix: {fix}")

    @classmethod
    def of_text(cls, text: str) -> LaunchError:
        """Create an error with the message of another machine."""
        error = cls.__new__(cls, text)
        error.args = (text,)
        return error


class OutputError(SdpgError):
    """Standard output cannot be written."""

    def __init__(self, where: str, found: str, *, reader_ended: bool) -> None:
        super().__init__(f"{where}: found {found}, expected a stream that can be written. Fix: redirect it elsewhere")
        self.reader_ended = reader_ended
        """True if the reader of a pipe has ended, as `head` does: not a failure."""


class WriteError(SdpgError):
    """A file of a run or an evaluation, other than a checkpoint, cannot be written."""

    def __init__(self, where: str, found: str, free_mib: int, fix: str) -> None:
        super().__init__(
            f"{where}: could not be written: {found} ({free_mib} MiB free). Files saved before are unchanged. "
            f"Fix: {fix}; the same command then continues from it"
        )


class RolloutError(SdpgError):
    """Failure of a rollout engine."""


class ServerError(RolloutError):
    """Failed request to a rollout server."""

    def __init__(self, url: str, call: str, found: str, *, retryable: bool = False) -> None:
        super().__init__(f"{url}{call}: {found}")
        self.url = url
        self.retryable = retryable
        """True if the same request may succeed later, or on another server."""


class MismatchError(SdpgError):
    """Log-probabilities of rollout engine and trainer differ too much."""

    def __init__(self, step: int, found: float, limit: float) -> None:
        super().__init__(
            f"step {step}: found a mean |log-prob in training - log-prob in rollout| of {found:.4g} nats, expected at "
            f"most {limit:g} (rollout.mismatch_limit). Fix: give both the same weights, dtype and temperature, and the "
            "server arguments that keep its numerics close; or, where the difference is understood, raise the limit"
        )


class FilterError(SdpgError):
    """A custom group filter raised or did not return a bool."""

    def __init__(self, spec: str, uid: str, found: str) -> None:
        super().__init__(
            f"selection.filters: {spec} on the group of {uid}: found {found}, expected True or False. Fix: correct it"
        )
        self.spec = spec


class VerifierError(SdpgError):
    """Too many verifier calls failed."""

    def __init__(self, where: str, failures: int, calls: int, first: str, limit: float) -> None:
        share = f"at most {limit:.0%} of them" if limit < 1 else "at least one that does not fail"
        super().__init__(
            f"reward.verifier: {where}: found {failures} of {calls} calls that failed, the first {first}; expected "
            f"{share} (reward.failure_limit). Fix: correct the verifier, or raise the limit; the same command then "
            "continues from the last checkpoint"
        )


class NumericsError(SdpgError):
    """Base class of errors about values that are not finite."""


class SkippedStepsError(NumericsError):
    """Too many consecutive optimizer steps were skipped."""

    def __init__(self, step: int, count: int) -> None:
        super().__init__(
            f"optimizer step {step}: found {count} consecutive steps whose loss or gradient is not finite, expected "
            "fewer than optimizer.skip_limit. All were skipped: the weights did not change. Fix: lower optimizer.lr or "
            "objective.beta, or remove another cause; the same command then continues from the last checkpoint"
        )


class NonFiniteLossError(NumericsError):
    """The loss is not finite in a host that would train on it."""

    def __init__(self, step: int, tokens: int) -> None:
        super().__init__(
            f"training step {step}: found {tokens} response tokens whose log-prob, divergence or loss is not finite, "
            "expected none. The weights did not change. Fix: continue from the last checkpoint with a lower learning "
            "rate or objective.beta"
        )


class NonFiniteWeightsError(NumericsError):
    """A weight of the model is infinite or NaN."""

    def __init__(self, when: str, tensor: str) -> None:
        super().__init__(
            f"{when}: tensor {tensor!r}: found values that are not finite, expected finite numbers. These weights are "
            "neither published nor saved. Fix: continue from the last checkpoint with a lower optimizer.lr or "
            "optimizer.weight_decay, or start from another model"
        )


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Up to three similar candidates as ``"did you mean 'a' or 'b'?"``; empty if none is similar."""
    near = difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


_FIXES = {
    errno.EROFS: "choose a path on a file system that is not read-only",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "choose a path without a loop of symbolic links",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space on the disk, or raise the quota"),
}


def reason_of(error: Exception) -> str:
    """Message of an error on one line; for a system error, the reason without number and path."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def fix_of(error: OSError, path: Path, *, reading: bool = False) -> str:
    """Fix for an `OSError` raised while writing, or reading, a path."""
    match error.errno:
        case errno.ENOENT if reading:
            missing = _first(path, lambda part: not _exists(part))
            return f"check the path: there is no {missing.name} in {missing.absolute().parent}"
        case errno.ENOENT:
            return f"create the folder {path.absolute().parent}"
        case errno.EISDIR:
            return f"name a file in the folder {path}" if reading else f"remove or rename the folder {path}"
        case errno.EEXIST | errno.ENOTDIR:
            obstacle = _first(path, lambda part: (part.is_symlink() or _exists(part)) and not part.is_dir())
            kind = "file" if _exists(obstacle) else "broken link"
            return f"remove or rename the {kind} {obstacle}, or choose another path"
        case errno.EACCES | errno.EPERM:
            action = "read" if reading else "write to"
            return f"get the right to {action} {_first_existing(path)}, or choose another path"
        case _:
            return _FIXES.get(error.errno or 0, "check the disk and its mount")


def _first(path: Path, found: Callable[[Path], bool]) -> Path:
    """Outermost part of a path for which `found` is true, else the whole path."""
    return next((part for part in (*reversed(path.parents), path) if found(part)), path)


def _first_existing(path: Path) -> Path:
    """Innermost existing part of a path."""
    return next((part for part in (path, *path.parents) if _exists(part)), path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # below a folder without access
        return False
