"""Methods that give each task channels of its own in one network."""
