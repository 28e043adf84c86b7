"""Pages to look at, each one HTML file that loads nothing from the network: report.html of runs, what an assembled
model does, and the page of forge_common.chat.

May import: errors, files.
"""
