"""How a benchmark is run and measured."""
