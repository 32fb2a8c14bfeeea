"""The parent side of the worker processes: spawn, supervise, place, talk."""
