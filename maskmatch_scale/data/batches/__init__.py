"""From places in the order to batches: the sources of a run, the weak view, loader processes, and held-out samples."""
