"""Types, argument checks, files, devices and memory, used by all packages."""
