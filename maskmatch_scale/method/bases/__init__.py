"""Weak-to-strong bases that the masked loss and the multi-scale ensemble attach to, one file each."""
