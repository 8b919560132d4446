"""Types, files, devices and memory: what every other room stands on."""
