"""The engines that `engine.library` may name.

To add one: write a class of `engine/protocol.py` in a file of its own, and add a line to `ENGINES`.
"""

from __future__ import annotations

ENGINES: dict[str, str] = {
    "deepspeed": "maskmatch_scale.engine.zero:ZeroEngine",
    "accelerate": "maskmatch_scale.engine.ddp:DdpEngine",
}
"""By name, `module:class`. A string, because this room imports no engine, and only the library in use is imported."""
