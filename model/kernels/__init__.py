"""Kernels: a folder per op, each with the reference that specifies it, the fast versions beside it, and one public function.

- window_attention: attention within shifted windows, from the packed projection to the un-shifted map.
- deformable_attention: every query reads a few points of every level of a pyramid; heads train through it.
"""
