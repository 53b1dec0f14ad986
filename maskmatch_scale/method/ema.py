"""How fast the teacher T follows the student S: the decay of T ← EMA(S).

How the average is stored and updated is the engine's matter (`engine/ema.py`).
"""

from __future__ import annotations


def ema_decay(step: int, largest: float) -> float:
    """min(1 - 1/(t+1), α): a plain mean of the first students, then an exponential one (mean teacher's ramp).

    Args:
        step: t ≥ 1, the number of optimizer steps taken.
        largest: α.
    """
    return min(1 - 1 / (step + 1), largest)
