"""What `evaluate` scores and draws: columns of documents, texts token by token, the chart.

May import: errors, files, data.
"""
