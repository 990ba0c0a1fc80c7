"""Merging methods, and the set-up on which their claims are shown."""
