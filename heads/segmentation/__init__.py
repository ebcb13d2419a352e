"""Semantic segmentation: Mask2Former on a backbone's maps."""
