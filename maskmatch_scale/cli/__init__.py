"""The `maskmatch` command. Nothing heavy is imported until a subcommand runs, so `--help` is instant."""
