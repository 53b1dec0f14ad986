"""MaskMatch itself: views, pseudo-labels, losses, bases. Knows no engine and no data loader."""
