"""Frameworks that bring models, or keep weights, of their own: one package each."""
