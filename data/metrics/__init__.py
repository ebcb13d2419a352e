"""Scores of finished predictions against ground truth."""
