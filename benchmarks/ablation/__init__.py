"""Arms × draws of labels on one task: what masks, ensemble and their details buy, at equal steps and at equal cost."""
