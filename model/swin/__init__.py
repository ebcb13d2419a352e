"""Swin V1 and V2: what they compute, how their weights are named and loaded."""
