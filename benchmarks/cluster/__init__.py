"""A model of a cluster: what happens on it in time, and the figures that it is fed with."""
