"""How good a model is: sliding windows, one global confusion matrix, pictures of predictions."""
