"""What both scripts share: a flat package, one noun a file."""
