"""The built-in data sets, drawn by programs: shapes, scenery, motion and glyphs."""
