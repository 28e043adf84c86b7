"""Shapes and weights: the configuration, the trunk, the kinds of module.

May import: errors, labels, loss, files.
"""
