"""Puts this folder on the path, so that tests of every subfolder share `tiny_models`."""
