"""A run of several hosts -> the command that starts it on all of them, run or printed.

`command` is what every kind shares: the run's options, checked here, and the command that a host's shell is given. `tpu_vm`,
`xpk`, `slurm` and `ssh` each put that into the hands of one kind of cluster.
"""
