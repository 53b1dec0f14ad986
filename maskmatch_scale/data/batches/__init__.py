"""From places in the order to batches: decoding, the weak view, loader processes, and passes over held-out samples."""
