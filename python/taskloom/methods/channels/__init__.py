"""Methods that run a network on a part of its channels."""
