"""What `maskmatch plan` predicts, against real steps of two ranks on this machine's CPU."""
