"""Built-in procedural worlds: small, deterministic, rendered on the fly, nothing downloaded.

`glyphs` is the classification world that pretrains the nano backbone, `drawing` the primitives it shares with the
detection world. The worlds themselves share no class, texture, background or seed.
"""
