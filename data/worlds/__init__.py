"""The built-in data sets, which programs draw: shapes, scenery, motion and glyphs."""
