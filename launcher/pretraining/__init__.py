"""`permafrost pretrain`: how the backbone that ships with the repository was made."""
