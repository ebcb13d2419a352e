"""Use any timm backbone as B."""
