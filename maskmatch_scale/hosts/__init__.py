"""What the hosts of a job are, and whether they fit together: compared when a run starts, and by hand before."""
