"""CTKD's temperature: learned against the student (arXiv 2211.16231)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class LearnedTemperature:
    """The temperature T = 1 + 20 sigmoid(tau) of ``ctkd``, whose tau climbs the loss that the student descends.

    Held like TAIDSchedule: a plain number outside the model, equal on all ranks. A step's loss uses ``value`` as it
    stood before; ``update`` is called once an optimizer step with the token mean, over all ranks and micro-batches, of
    ``LinearDistillationOutput.temperature_gradient_N``. The climb's strength rises from 0 to 1 by a cosine over the
    run (the paper: over its first 10 epochs), so that the student is first taught and then challenged.

    Args:
        learning_rate: of tau's gradient ascent, without momentum (our choice).
    """

    learning_rate: float = 0.05

    def __post_init__(self):
        if not self.learning_rate >= 0.0:
            raise ValueError(f"the temperature's learning rate must not be negative, but is {self.learning_rate}")
        self.tau = 1.0  # as in the authors' code: T starts at 15.6

    @property
    def value(self) -> float:
        return 1.0 + 20.0 * self._share()

    def _share(self) -> float:
        return 1.0 / (1.0 + math.exp(-self.tau)) if self.tau >= 0 else math.exp(self.tau) / (1.0 + math.exp(self.tau))

    def update(self, gradient: float, step: int, num_steps: int) -> float:
        """Moves tau after an optimizer step.

        Args:
            gradient: token mean of d loss / d T, the same on every rank. One that is not finite moves nothing.
            step: optimizer steps done before this one, from 0.
            num_steps: optimizer steps of the whole run.

        Returns:
            The new temperature.
        """
        if math.isfinite(gradient):
            strength = 0.5 * (1.0 - math.cos(math.pi * min(1.0, step / max(num_steps, 1))))
            share = self._share()
            self.tau += self.learning_rate * strength * gradient * 20.0 * share * (1.0 - share)
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: what ``load_state_dict`` needs to go on bit for bit."""
        return {"tau": self.tau}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tau = state["tau"]
