"""What both scripts share: one noun a file, folders by subject."""
