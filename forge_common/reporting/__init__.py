"""Pages to look at, each one HTML file without network: report.html of runs, and what an assembled model does.

May import: errors, files.
"""
