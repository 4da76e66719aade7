"""Pieces of one artifact made by any number of processes, on any machines, over one shared folder."""

from distill.sharing.progress import ArtifactState, artifact_state, units_left
from distill.sharing.search import MANIFEST
from distill.sharing.sharing import Make, Sharing
from distill.sharing.worker import Worker

__all__ = ["MANIFEST", "ArtifactState", "Make", "Sharing", "Worker", "artifact_state", "units_left"]
