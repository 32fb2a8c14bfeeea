"""Figures and logs of a registry for the systems that watch it; each module is imported by those who use it."""
