"""Pages to look at, each one HTML file without network: report.html of runs, and what an assembled model does; and the
page of forge_common.chat.

May import: errors, files.
"""
