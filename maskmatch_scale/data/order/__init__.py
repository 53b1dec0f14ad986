"""Which sample comes when: the order of an epoch, the queue of epochs of a source, and the exact mix of sources."""
