"""How several modules work together: the mixture, the routers, the statistics they read.

May import: errors, loss, files, model.
"""
