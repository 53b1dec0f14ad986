"""Evaluation of a model: inference on images of any size, one confusion matrix over a split, pictures."""
