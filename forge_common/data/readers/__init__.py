"""Documents from files: plain text, JSON and CSV records, tables.

May import: errors. A new format is a file here and a line in `data/sources.py`.
"""
