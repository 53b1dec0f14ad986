"""Evaluation of a model: sliding windows, one confusion matrix over a split, pictures of predictions."""
