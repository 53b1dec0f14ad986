"""What programs reach of data sheets. The figures are in a place of their own, each with where it comes from."""

from __future__ import annotations

LAUNCH_S = 8e-6
