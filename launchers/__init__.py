"""How a run is started on more than one process: torchrun on this machine."""
