"""From text to the windows of each update: sources, tokenizer, token store, windows, order.

May import: errors, flags, files, heap, labels. No knowledge of models or runs.
"""
