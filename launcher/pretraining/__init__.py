"""Pretrain a backbone, as the one in the repository was made: `permafrost pretrain`."""
