"""What any task does with pictures: reading, geometry, augmentation, drawing, plots."""
