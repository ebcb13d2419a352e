"""Segment images semantically: Mask2Former on a backbone's maps."""
