"""Any timm backbone as B."""
