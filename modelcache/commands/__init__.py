"""What the ``modelcache`` command does; needs the extra ``modelcache[cli]``. Uses the public API, like anyone else."""
