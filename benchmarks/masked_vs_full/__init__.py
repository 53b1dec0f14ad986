"""What masking saves: the backbone on whole images, on visible units only, and on images with zeroed pixels.

Whole images run through the libraries' own models too, so that the table also says what is gained over those.

python -m benchmarks.masked_vs_full --out benchmarks/results/masked_vs_full.json
"""
