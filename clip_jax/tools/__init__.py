"""Offline commands, which the library never imports."""
