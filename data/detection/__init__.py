"""Detection and instance segmentation: reads COCO's layout, augments, evaluates and checks it."""
