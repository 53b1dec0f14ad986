"""Trains a recipe once for each combination of values: `maskmatch sweep`."""
