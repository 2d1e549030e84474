"""A verdict in the words that fit the run: whose condition it is, and what crossing it does."""

from __future__ import annotations

from lightning_maml_guard.theory.limits import (
    FIRST_ORDER_EFFECT,
    INNER_LOOP_EFFECT,
    POSTER_EFFECT,
    Limit,
    Verdict,
    judge,
)

# The poster's theorem is about simplified MAML; users of the other orders must know what its alarm means for them.
_ORDER_NOTES = {
    "exact": "(This is the poster's condition; exact MAML, which this run trains, is a different update and its inner "
    "loop diverges only beyond twice alpha_c. criterion='exact' judges that update.)",
    "first": "(This is the poster's condition; it holds for first-order MAML with one inner step.)",
}
_EFFECTS = {"exact": INNER_LOOP_EFFECT, "first": FIRST_ORDER_EFFECT, "simplified": POSTER_EFFECT}


def judged(
    alpha: Limit | None,
    beta: Limit | None,
    *,
    order: str,
    exact: bool,
    flat: bool,
    plain_sgd: bool,
    margin: float,
    hvps: int,
    step: int | None,
    alpha_note: str,
    beta_note: str,
) -> Verdict:
    """Judge the rates of a measurement.

    Args:
        alpha: The inner rate and its limit; None in plain training.
        beta: The meta rate and its limit; None where no meta rate was given.
        order: How the meta-gradient is taken; empty in plain training.
        exact: Whether the limits are those of the update as configured.
        flat: Whether there is no curvature at all.
        plain_sgd: Whether the optimizer is SGD without momentum, so that the growth a step is known.
        margin: Fraction of the critical values that counts as the threshold.
        hvps: Products used.
        step: Training step.
        alpha_note: Why the inner rate has no limit, if so.
        beta_note: Why the meta rate has no limit, if so.

    Returns:
        The verdict.
    """
    cost = f"{hvps} Hessian-vector products" + ("" if step is None else f", step {step}")
    if flat:
        reason = (
            f"The loss has no curvature at these parameters and this batch ({cost}), so no limit follows; that is "
            "not the same as safe. ReLU networks with dead units and losses that are linear look like this."
        )
        return Verdict("unresolved", "unresolved", "unresolved", (reason,))
    known = plain_sgd and beta is not None and beta.critical > 0
    return judge(
        alpha,
        beta,
        margin=margin,
        growth=abs(1 - 2 * beta.value / beta.critical) if known and beta is not None else None,
        cost=cost,
        beta_note=beta_note,
        alpha_note=alpha_note or ("" if exact else _ORDER_NOTES.get(order, "")),
        alpha_effect=_EFFECTS.get(order, POSTER_EFFECT) if exact else POSTER_EFFECT,
    )
