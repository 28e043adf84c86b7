"""What `evaluate` scores, prints and draws: columns of documents, texts token by token, progress, tables, the chart.

May import: errors, labels, files, model, data, routing, artifacts.
"""
