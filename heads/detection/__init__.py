"""Detect objects: heads and the parts they are made of."""
