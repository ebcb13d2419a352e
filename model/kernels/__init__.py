"""Kernels: a folder per op, each with the reference that specifies it, the fast versions beside it, and one public function;
selection.py says which version runs, verified.py which ones have been found right and fast on which GPUs.

- window_attention: attention within shifted windows, from the packed projection to the un-shifted map.
- residual_norm: a branch is normalised and added to the main one, in one pass.
- linear_gelu: a linear layer with a GELU in its epilogue.
- deformable_attention: every query reads a few points of every level of a pyramid; heads train through it.
"""
