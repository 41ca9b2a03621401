"""A run of train.py: steps, and what happens between them."""
