"""Carry one training from its folder to its last checkpoint."""
