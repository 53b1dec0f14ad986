"""``python -m maskmatch_scale`` is the `maskmatch` command; launchers start it with ``--module maskmatch_scale``."""

from maskmatch_scale.cli.main import main

main()
