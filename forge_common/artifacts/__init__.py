"""What a run publishes, and how it is validated before use: metadata, trunks, modules, assembled models.

May import: errors, flags, files, heap, model, data, routing.
"""
