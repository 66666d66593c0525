"""Dependency parsing: a biaffine parser on any encoder."""
