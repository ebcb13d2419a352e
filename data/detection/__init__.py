"""Detection and instance segmentation: COCO's layout, its augmentation, evaluation and checks."""
