"""Methods that train a sparse part of a network."""
