"""Runs over several hosts, of namespaces of one machine: a host that is cut off, slow and lossy links."""
