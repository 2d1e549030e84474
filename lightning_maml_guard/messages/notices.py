"""Sentences that are not about rates: files, batches, states and caps that a guard cannot write or use."""

from __future__ import annotations

from collections.abc import Callable

from lightning_maml_guard.messages.reasons import Kind, Reason


def not_written(what: str, path: object, error: OSError) -> str:
    """Say that a file could not be written."""
    return (
        f"ConvergenceGuard: {what} could not be written to {path}; an older file there is unchanged.\n"
        f"Cause: {type(error).__name__}: {error}\nTo do: Make room, or write elsewhere."
    )


def _batch_not_copied(reason: Reason) -> str:
    return (
        f"the batch at step {reason.step} cannot be copied ({reason.what}), so it is not checked; training goes on. A "
        f"check works on a copy, so that training gets the batch unchanged.\nCause: {reason.detail}\nTo do: Leave "
        f"out of the batch what cannot be copied, or give {reason.what} a method clone()."
    )


def _cap_ignored(reason: Reason) -> str:
    return (
        f"the module has an attribute inner_lr_cap, but under a cap of {reason.limit:.3g} the inner rate of its "
        f"problem is {reason.value:.3g}, so the guard does not lower it.\nTo do: Where the cap is not None, use the "
        "smaller of both in the inner loop and in the problem that is given to the guard, or remove the attribute."
    )


def _state_not_read(reason: Reason) -> str:
    return f"the guard's state in the checkpoint cannot be read, so it starts anew.\nCause: {reason.detail}"


NOTICES: dict[Kind, Callable[[Reason], str]] = {
    Kind.BATCH_NOT_COPIED: _batch_not_copied,
    Kind.CAP_IGNORED: _cap_ignored,
    Kind.STATE_NOT_READ: _state_not_read,
}
