"""Everything that tasks share about pictures: reading, geometry, augmentation, drawing, plots."""
