"""Training a run, from a recipe to a report."""
