"""The stages, one a file, each read from top to bottom like the paper's section."""
