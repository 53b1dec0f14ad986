"""A run: its folder, its data, its model, its evaluation."""
