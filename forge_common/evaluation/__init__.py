"""What `evaluate` scores, prints and draws: columns of documents, progress, tables, the chart.

May import: errors, files, data, artifacts.
"""
