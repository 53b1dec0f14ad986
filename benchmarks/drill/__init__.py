"""Whether a run survives: real jobs that are killed, stopped, moved, damaged and cut off, and what was lost of them."""
