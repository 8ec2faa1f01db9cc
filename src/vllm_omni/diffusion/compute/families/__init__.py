"""Model families: one package for each."""
