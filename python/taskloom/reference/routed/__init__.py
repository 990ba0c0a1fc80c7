"""The routed family in plain torch."""
