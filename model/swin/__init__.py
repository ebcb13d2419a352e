"""Define Swin V1 and V2: what they compute, and how their weights are named and loaded."""
