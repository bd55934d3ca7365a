"""CARAFE++ in other people's networks."""
