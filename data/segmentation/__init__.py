"""Semantic segmentation in the layout of ADE20K's SceneParsing release: labels, augmentation, views, checks."""
