"""From bytes to pixels and back: one decoder of images and one of label maps, for readers and for writers of shards.

`opening` opens image files and has what both decoders share, `image` and `label` decode to NumPy arrays, `encode`
encodes. `bands` says what an image that is not RGB holds, `band_pages` encodes and decodes it as it lies in shards,
`raster` reads it from other files. None of these imports torch, whose import costs each process of a writer seconds.
`decode` is for readers: it gives tensors.
"""
