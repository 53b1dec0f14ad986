"""The `maskmatch` command. Large libraries are imported only when a subcommand runs, so `--help` is fast."""
