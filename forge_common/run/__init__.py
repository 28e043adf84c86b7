"""Operating a run: progress, output directory, stopping, launch checks, engines, logging, trackers.

May import: errors, flags, settings, schedule, files, heap, reporting. No knowledge of models or data.
"""
