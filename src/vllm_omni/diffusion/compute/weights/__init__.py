"""Loading of weights, and random weights in their place."""
