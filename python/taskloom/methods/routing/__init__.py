"""Methods that route samples to experts."""
