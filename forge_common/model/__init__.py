"""Shapes and weights: the configuration, the trunk, the kinds of module.

May import: autocast, errors, labels, loss, files.
"""
