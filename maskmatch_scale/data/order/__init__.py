"""Which sample comes when: the order of an epoch, queues of epochs, and the exact mix of several sources."""
