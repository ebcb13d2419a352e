"""`permafrost pretrain`: the pretraining that made the backbone in the repository."""
