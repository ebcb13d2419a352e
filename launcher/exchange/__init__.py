"""Weights and heads in other programs' formats."""
