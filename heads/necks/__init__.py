"""Necks mix the levels of a feature pyramid."""
