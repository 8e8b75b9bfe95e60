"""What takes a step of training on one sequence."""

from __future__ import annotations

from enum import StrEnum

from infscan.errors import ConfigError


class StepOptimizer(StrEnum):
    """What takes a training step."""

    sgd = "sgd"
    adamw = "adamw"


def check_step(learning_rate: float | None, fall: float) -> None:
    """Raises ConfigError for a step that cannot be taken, or a rate that cannot be looked for."""
    if learning_rate is not None and learning_rate <= 0:
        raise ConfigError(f"learning_rate={learning_rate}: give a number above 0, or null.")
    if not 0 < fall < 1:
        raise ConfigError(f"fall={fall}: a share of a loss, between 0 and 1.")
