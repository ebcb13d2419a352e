"""Necks: what mixes the levels of a feature pyramid."""
