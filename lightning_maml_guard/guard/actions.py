"""What a guard does when the rates are unsafe: one class per action, and the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from lightning_maml_guard.guard.rescale import BY_RATIO, NO_CAPS, at_limits, lowered, lowered_further, released
from lightning_maml_guard.guard.state_machine import Transition
from lightning_maml_guard.lookahead.divergence import Scale
from lightning_maml_guard.lookahead.lookahead import Caps, Lookahead
from lightning_maml_guard.lookahead.results import LookaheadResult
from lightning_maml_guard.messages.spelling import Spelling, rates
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import UNSAFE


@dataclass(frozen=True)
class Situation:
    """What an action decides on.

    Attributes:
        report: The measurement.
        transition: What the check changed.
        caps: The caps so far.
        margin: Fraction of the critical values that rates are capped at.
        reach_alpha: Whether the module's inner rate can be capped.
        fails: Whether the lookahead diverges, or the last loss has where no step can be tried.
        rolled_back: Whether the run was rolled back before the measurement.
        present: The lookahead under the caps so far; None without one.
        lookahead: Looks ahead; None where it cannot.
        scale: How losses are compared.
        allows: Whether caps may be tried: not where their rates have just failed.
        harmful: Whether adaptation makes tasks worse.
        advised: The inner rate that is advised for several inner steps, and the outer rate; None where none is.
        follows_advice: Whether rates may be no higher than what is advised.
        has_diverged: Whether the loss is too high already, not only after the coming steps.
    """

    report: StabilityReport
    transition: Transition
    caps: Caps
    margin: float
    reach_alpha: bool
    fails: bool
    rolled_back: bool
    present: LookaheadResult | None
    lookahead: Lookahead | None
    scale: Scale = BY_RATIO
    allows: Callable[[Caps], bool] = lambda caps: True
    harmful: bool = False
    advised: Caps = NO_CAPS
    follows_advice: bool = False
    has_diverged: bool = False


class Action:
    """What a guard does when the rates are unsafe; the base of the classes below, which differ in these attributes.

    Attributes:
        speaks: Whether warnings and messages are given.
        caps_rates: Whether rates are capped; such a guard goes on looking while they are unsafe.
        stops: Whether the Trainer is asked to stop.
        resumes_exactly: Whether a checkpoint holds the lookahead's batches, so that a resumed run is the one that was
            interrupted. Where the guard does nothing to the run they would only swell the checkpoint.
    """

    speaks: ClassVar[bool] = True
    caps_rates: ClassVar[bool] = False
    stops: ClassVar[bool] = False
    resumes_exactly: ClassVar[bool] = False

    def decide(self, situation: Situation) -> Caps:
        """Find the caps from the coming step on."""
        return situation.caps

    def release(
        self,
        caps: Caps,
        present: LookaheadResult,
        look: Lookahead,
        scale: Scale,
        allows: Callable[[Caps], bool],
        advised: Caps,
    ) -> Caps:
        """Find the caps of a capped run whose lookahead passes; ``advised``: the rates that are."""
        return caps

    def lower_further(
        self, caps: Caps, present: LookaheadResult, look: Lookahead, scale: Scale, reach_alpha: bool, stagnates: bool
    ) -> Caps:
        """Find the caps of a run that loses ground, or stands still, although its lookahead passes."""
        return caps

    def effect(self, spelling: Spelling, applied: str, *, helps: bool, changed: bool) -> list[str]:
        """Say what the guard does now that the rates are unsafe.

        ``applied``: the rates applied from now on; ``helps``: whether capping rates reaches the one to blame;
        ``changed``: whether other rates are applied than before.
        """
        return []


class Log(Action):
    """Log the numbers; weights, optimizer state and random numbers are bitwise those of a run without the guard."""

    speaks = False


class Warn(Action):
    """Warn each time the state changes to unsafe."""

    def effect(self, spelling: Spelling, applied: str, *, helps: bool, changed: bool) -> list[str]:
        """Name the action that would act."""
        return [f"Or let the guard do it: {spelling.guard(action='rescale')}."] if helps else []


OUT_OF_REACH = (
    "The guard cannot lower this module's inner rate; it could by an attribute inner_lr_cap "
    '(docs/guide.md, "A MAML module of your own").'
)


class Rescale(Action):
    """Cap the applied rates until a lookahead survives, and release them as the safe region widens."""

    caps_rates = True
    resumes_exactly = True

    def decide(self, situation: Situation) -> Caps:
        """Lower the rates of a diverging run; release those of a healthy one."""
        report, caps, reach = situation.report, situation.caps, situation.reach_alpha
        present, look, margin = situation.present, situation.lookahead, situation.margin
        fails = situation.fails and situation.transition.state == UNSAFE
        if present is None or look is None:
            waiting = report.status == UNSAFE and situation.transition.state != UNSAFE
            found = caps if waiting else at_limits(report, caps, margin, reach)
            return found.halved(report.beta) if fails else found
        rolled_back = situation.rolled_back
        if rolled_back or fails or (situation.harmful and reach):
            loss = look.under(caps).begin if rolled_back else present.begin
            found = lowered(
                report,
                caps,
                margin,
                look.under,
                loss=loss,
                present=present if situation.has_diverged and not rolled_back else None,
                reach_alpha=reach,
                at_least_halve=rolled_back,
                scale=situation.scale,
            )
            if found.alpha is not None and situation.advised.alpha is not None:
                found = Caps(min(found.alpha, situation.advised.alpha), found.beta)
        elif situation.fails:
            return caps
        else:
            found = self.release(caps, present, look, situation.scale, situation.allows, situation.advised)
        # A rate that survives the next steps may still kill what could have learned.
        return found.at_most(situation.advised.beta) if situation.follows_advice else found

    def release(
        self,
        caps: Caps,
        present: LookaheadResult,
        look: Lookahead,
        scale: Scale,
        allows: Callable[[Caps], bool],
        advised: Caps,
    ) -> Caps:
        """Release the caps as far as lookaheads allow."""
        if caps == Caps() or present.begin != look.begin:  # where the first did not pass, the present one is another
            return caps
        return released(look.alpha, look.beta, caps, present, look.under, scale=scale, allows=allows, advised=advised)

    def lower_further(
        self, caps: Caps, present: LookaheadResult, look: Lookahead, scale: Scale, reach_alpha: bool, stagnates: bool
    ) -> Caps:
        """Lower the rates as long as that leads further down."""
        alpha, beta, tried = look.alpha, look.beta, look.under
        return lowered_further(
            alpha, beta, caps, present, tried, reach_alpha=reach_alpha, scale=scale, stagnates=stagnates
        )

    def effect(self, spelling: Spelling, applied: str, *, helps: bool, changed: bool) -> list[str]:
        """Name the rates that are applied."""
        by = spelling.arguments(action="rescale")
        done = f"Applied from now on: {applied} ({by})."
        if not changed:
            lower = "a lower rate" if helps else "a lower lr"
            done = f"Nothing is lowered: {lower} does not bring the loss down ({by})."
        return [done if helps else f"{done} {OUT_OF_REACH}"]


class Stop(Action):
    """Ask the Trainer to stop."""

    stops = True
    resumes_exactly = True

    def effect(self, spelling: Spelling, applied: str, *, helps: bool, changed: bool) -> list[str]:
        """Say that training stops."""
        return [f"Training stops after this step ({spelling.arguments(action='stop')})."]


def applied_rates(caps: Caps, alpha: float, beta: float) -> str:
    """Write the rates that caps apply, also where it is only the schedule that will exceed them."""
    applied = caps.applied(alpha, beta)
    if caps.beta is not None and caps.beta > applied[1]:
        return f"{rates(applied[0], caps.beta)} at most"
    return rates(*applied)


# A new action is a class above and a row here.
ACTIONS: dict[str, Action] = {"log": Log(), "warn": Warn(), "rescale": Rescale(), "stop": Stop()}
