"""How long a step's units take, and which of those that run are late: a throttled or ailing machine's."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

# A unit that runs for so many medians, and so many seconds longer than one, goes to an idle worker as well.
LATE, LATE_S = 3.0, 10.0
# Of fewer finished units the median says little; of more than these the last ones are asked.
_LEAST, _MOST = 3, 1000


@dataclass
class UnitTimes:
    """Seconds that a step's finished units took, from being handed out."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_MOST))

    def add(self, seconds: float) -> None:
        self.seconds.append(seconds)

    @property
    def usual_s(self) -> float:
        """Their median."""
        return median(self.seconds)

    @property
    def late_after_s(self) -> float:
        """What a unit may take before it is late; infinity where too few have finished."""
        if len(self.seconds) < _LEAST:
            return float("inf")
        usual_s = self.usual_s
        return max(LATE * usual_s, usual_s + LATE_S)
