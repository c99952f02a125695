"""The cases: a file each, with a function of its name that gives the races to be run."""
