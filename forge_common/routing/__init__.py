"""How several modules work together: the mixture, the routers, and the statistics that routers use.

May import: errors, labels, loss, files, model.
"""
