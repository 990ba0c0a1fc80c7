"""Every op in a few lines of plain torch: the definition that all backends are tested against. Imports only torch."""
