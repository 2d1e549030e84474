"""The configurations: healthy bases near the best rates of their family, and the same with one thing broken.

The cause of a broken configuration is known by construction, and these answers count as right:

- ``alpha``, ``beta``, ``both``: one rate, or both, are multiplied. Only that cause.
- ``schedule``: the peak is multiplied. ``"schedule"``, or ``"beta"`` with a rate for beta and none for alpha.
- ``batch``: the rates are the base's, and one batch has targets 30 times too large in half of its tasks. Only that.
- ``dead units``: beta is so large that units die and the run stays near the loss of an untrained network.
  ``"dead units"``, or ``"beta"`` with a rate for beta and none for alpha.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.advice.training import Setting

HEALTHY = "healthy"
CAUSES = ("alpha", "beta", "both", "schedule", "batch", "dead units")
BY_BETA = frozenset({"schedule", "dead units"})  # causes for which "beta" with a rate for beta alone is right, too

BASES = {
    "relu sgd": Setting("relu", "sgd", alpha=0.03, beta=0.02),
    "relu momentum": Setting("relu", "momentum", alpha=0.03, beta=0.004),
    "relu adam": Setting("relu", "adam", alpha=0.03, beta=0.01),
    "relu adamw first": Setting("relu", "adamw", alpha=0.03, beta=0.01, order="first"),
    "relu sgd K5": Setting("relu", "sgd", alpha=0.01, beta=0.02, inner_steps=5),
    "relu adam K5": Setting("relu", "adam", alpha=0.01, beta=0.006, inner_steps=5),
    "relu sgd fixed": Setting("relu", "sgd", alpha=0.03, beta=0.03, resample=False),
    "tanh sgd": Setting("tanh", "sgd", alpha=0.05, beta=0.07),
    "tanh momentum": Setting("tanh", "momentum", alpha=0.05, beta=0.008),
    "tanh adam": Setting("tanh", "adam", alpha=0.05, beta=0.01),
    "tanh adamw first": Setting("tanh", "adamw", alpha=0.05, beta=0.005, order="first"),
    "tanh sgd K5": Setting("tanh", "sgd", alpha=0.03, beta=0.04, inner_steps=5),
    "tanh adam K5": Setting("tanh", "adam", alpha=0.02, beta=0.008, inner_steps=5),
    "tanh adam fixed": Setting("tanh", "adam", alpha=0.05, beta=0.01, resample=False),
    "lstm sgd": Setting("lstm", "sgd", alpha=0.1, beta=0.5),
    "lstm momentum first": Setting("lstm", "momentum", alpha=0.1, beta=0.06, order="first"),
    "lstm adam": Setting("lstm", "adam", alpha=0.1, beta=0.03),
    "transformer sgd": Setting("transformer", "sgd", alpha=0.03, beta=0.05),
    "transformer adam": Setting("transformer", "adam", alpha=0.02, beta=0.009),
    "transformer adamw first": Setting("transformer", "adamw", alpha=0.02, beta=0.015, order="first"),
    "conv sgd": Setting("conv", "sgd", alpha=0.4, beta=0.2),
    "conv momentum first": Setting("conv", "momentum", alpha=0.2, beta=0.05, order="first"),
    "conv adam": Setting("conv", "adam", alpha=0.4, beta=0.01),
    "our relu sgd": Setting("our relu", "sgd", alpha=0.03, beta=0.02),
    "our relu momentum": Setting("our relu", "momentum", alpha=0.03, beta=0.004),
    "our relu adam K5": Setting("our relu", "adam", alpha=0.01, beta=0.006, inner_steps=5),
    "our conv sgd": Setting("our conv", "sgd", alpha=0.4, beta=0.2),
    "our conv adam": Setting("our conv", "adam", alpha=0.4, beta=0.01),
    "our conv adam first": Setting("our conv", "adam", alpha=0.2, beta=0.01, order="first"),
}


@dataclass(frozen=True)
class Configuration:
    """One configuration.

    Attributes:
        base: Name of its base.
        cause: What is broken, one of CAUSES, or HEALTHY.
        alpha_factor: What the base's inner rate is multiplied by.
        beta_factor: The same of the outer rate.
        schedule: One of SCHEDULES.
        outlier: Step of an outlier batch.
    """

    base: str
    cause: str
    alpha_factor: float = 1.0
    beta_factor: float = 1.0
    schedule: str = ""
    outlier: int | None = None

    @property
    def name(self) -> str:
        """A name to find it by."""
        parts = [f"{self.base}:", "" if self.cause in {"alpha", "beta"} else self.cause, self.schedule]
        parts += [f"alpha x{self.alpha_factor:g}"] if self.alpha_factor != 1 else []
        parts += [f"beta x{self.beta_factor:g}"] if self.beta_factor != 1 else []
        return " ".join(filter(None, parts))

    @property
    def healthy_setting(self) -> Setting:
        """The base, under the configuration's schedule."""
        return replace(BASES[self.base], schedule=self.schedule)

    @property
    def setting(self) -> Setting:
        """What is run."""
        base = self.healthy_setting
        return replace(
            base, alpha=base.alpha * self.alpha_factor, beta=base.beta * self.beta_factor, outlier=self.outlier
        )

    def is_right(self, advice: dict[str, Any] | None) -> bool:
        """Return True if an advice names the cause."""
        if advice is None:
            return False
        beta_alone = advice["cause"] == "beta" and advice["beta"] is not None and advice["alpha"] is None
        return advice["cause"] == self.cause or (self.cause in BY_BETA and beta_alone)


_ALPHA = {
    "relu sgd": (10, 30),
    "relu adam": (15, 50),
    "relu sgd K5": (5, 20),
    "relu adam K5": (5, 20),
    "tanh sgd": (10,),
    "tanh adam": (10, 30),
    "tanh adamw first": (20,),
    "tanh sgd K5": (3,),
    "tanh adam K5": (3, 20),
    "lstm sgd": (30,),
    "lstm adam": (30,),
    "transformer sgd": (10,),
    "transformer adam": (10, 100),
    "transformer adamw first": (30,),
    "conv sgd": (30,),
    "our relu adam K5": (10,),
    "our conv sgd": (30,),
    "our conv adam": (30,),
}
_BETA = {
    "relu sgd": (15, 100),
    "relu momentum": (15, 100),
    "relu adam": (50, 300),
    "relu adamw first": (100,),
    "relu sgd K5": (10, 25),
    "relu adam K5": (100,),
    "relu sgd fixed": (30,),
    "tanh sgd": (4, 30),
    "tanh momentum": (12,),
    "tanh adam": (30, 200),
    "tanh adamw first": (30,),
    "tanh sgd K5": (10,),
    "tanh adam K5": (12, 100),
    "lstm sgd": (8, 50),
    "lstm momentum first": (30,),
    "lstm adam": (50,),
    "transformer sgd": (12,),
    "transformer adam": (10, 100),
    "transformer adamw first": (30,),
    "conv sgd": (10, 100),
    "conv adam": (30,),
    "our relu sgd": (20,),
    "our relu adam K5": (50,),
    "our conv adam": (30,),
    "our conv sgd": (10,),
}
_BOTH = {
    "relu sgd": (15, 30),
    "relu adam K5": (20, 50),
    "tanh adam": (15, 30),
    "tanh sgd K5": (5, 20),
    "transformer sgd": (15, 15),
    "our relu momentum": (15, 30),
}
_SCHEDULE = (
    ("relu sgd", "warmup", 15),
    ("relu momentum", "warmup", 40),
    ("relu adam", "warmup", 50),
    ("relu sgd", "warmup epochs", 40),
    ("relu momentum", "onecycle", 20),
    ("tanh sgd", "warmup", 14),
    ("tanh adam", "onecycle", 50),
    ("tanh sgd", "warmup restarts", 10),
    ("tanh adam", "restarts", 50),
    ("lstm sgd", "onecycle", 20),
    ("transformer adam", "warmup restarts", 15),
    ("transformer sgd", "warmup", 15),
    ("conv sgd", "warmup", 10),
    ("our relu sgd", "warmup", 15),
    ("our relu sgd", "restarts", 20),
    ("our conv adam", "onecycle", 30),
)
_BATCH = (
    "relu sgd",
    "relu momentum",
    "tanh sgd",
    "tanh momentum",
    "transformer sgd",
    "our relu sgd",
    "our relu momentum",
)
_DEAD = {"relu sgd": 5, "relu adam": 20, "relu adamw first": 20, "our relu adam K5": 15}
_MODERATE = {"our relu sgd": 1.5, "tanh adam": 1.5, "lstm sgd": 1.5, "conv sgd": 1.5}
_CALM = (
    ("relu adam", "warmup"),
    ("conv sgd", "cosine"),
    ("tanh adam", "onecycle"),
    ("relu momentum", "warmup epochs"),
    ("transformer adam", "warmup restarts"),
)
_AS_IT_IS = (
    "relu sgd",
    "relu momentum",
    "relu adam K5",
    "tanh sgd",
    "tanh adamw first",
    "tanh sgd K5",
    "lstm adam",
    "transformer sgd",
    "transformer adamw first",
    "conv adam",
    "our relu adam K5",
    "our conv sgd",
)


def configurations() -> list[Configuration]:
    """List all configurations, the healthy ones last."""
    found = [Configuration(base, "alpha", alpha_factor=x) for base, xs in _ALPHA.items() for x in xs]
    found += [Configuration(base, "beta", beta_factor=x) for base, xs in _BETA.items() for x in xs]
    found += [Configuration(base, "both", a, b) for base, (a, b) in _BOTH.items()]
    found += [Configuration(base, "schedule", beta_factor=x, schedule=name) for base, name, x in _SCHEDULE]
    found += [Configuration(base, "batch", outlier=int(0.4 * BASES[base].steps)) for base in _BATCH]
    found += [Configuration(base, "dead units", beta_factor=x) for base, x in _DEAD.items()]
    found += [Configuration(base, HEALTHY) for base in _AS_IT_IS]
    found += [Configuration(base, HEALTHY, beta_factor=x) for base, x in _MODERATE.items()]
    found += [Configuration(base, HEALTHY, schedule=name) for base, name in _CALM]
    return found
