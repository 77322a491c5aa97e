"""Vision towers behind one dial: what a budget buys of each, what it costs, what the tower makes of it.

tower.py is the interface, flux.py the project's own, the others stock models of transformers.
"""
