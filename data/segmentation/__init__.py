"""Semantic segmentation: reads the layout of ADE20K's SceneParsing release, augments, splits into views and checks it."""
