"""Kernels: a folder per op, each with the reference that specifies it, the fast versions beside it, and one public function.

- window_attention: attention within shifted windows, from the packed projection to the un-shifted map.
"""
