"""From bytes to pixels and back: one decoder of images and one of label maps, for readers and for writers of shards.

`opening` opens image files and has what both decoders share, `image` and `label` decode to NumPy arrays, `encode`
encodes. None of these imports torch, whose import costs each process of a writer seconds. `decode` is for readers: it
gives tensors.
"""
