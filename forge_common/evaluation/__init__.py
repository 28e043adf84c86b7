"""What `evaluate` scores and draws: columns of documents, the chart.

May import: errors, files, data.
"""
