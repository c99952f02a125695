"""Layouts of rows: what the keys of public tools and data sets mean. Rows -> samples, before they are checked."""
