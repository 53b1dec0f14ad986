"""The quickstart's data: real music scores, engraved and aged like scans, with exact labels."""
