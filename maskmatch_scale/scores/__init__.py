"""The quickstart's data source: real music scores, engraved and aged like scans, with exact labels.

`source` is what the writer of shards gets. `split` deals the works of the corpus to streams, `page` renders one page,
`corpus` reads the scores, `engraving` draws them, `ageing` makes them look scanned.
"""
