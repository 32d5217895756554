"""Analyses of a test or a model: one file each, which gives numbers and a figure."""
