"""Text on its way to the model: sources -> documents -> tokens on disk -> windows -> the windows of each update."""
