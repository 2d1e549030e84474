"""Sentences on what a rate beyond its limit does, by ``Reason.effect``, and on the criterion, by ``Reason.order``."""

from __future__ import annotations

EFFECTS = {
    "simplified": "simplified MAML's objective, lambda - alpha*lambda^2, curves downwards along the sharpest "
    "direction, so no outer rate brings it to a minimum.",
    "inner loop": "the inner loop itself diverges: along the sharpest direction each inner step multiplies the error "
    "by |1 - alpha*lambda_max| > 1.",
    "first order": "first-order MAML's update, lambda*(1 - alpha*lambda)^K, turns against the sharpest direction, so "
    "no outer rate brings it to a minimum.",
    "inner loop, other steps": "the inner loop itself diverges: the error grows along the sharpest direction.",
    "first order, other steps": "first-order MAML's update turns against the sharpest direction, so no rate is stable.",
    "no stable rate": "no positive outer rate is stable while alpha exceeds alpha_c.",
    "within the margin": "the update is nearer to its limit than the margin allows.",
}
ORDERS = {
    "exact": "(This is the simplified criterion; exact MAML, which this run trains, is a different update and its "
    "inner loop diverges only beyond twice alpha_c. criterion='exact' judges that update.)",
    "first": "(This is the simplified criterion; it holds for first-order MAML with one inner step.)",
}
