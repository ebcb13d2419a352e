"""Recipes, which are found by name, overridden on the command line, written as JSON and read back."""
