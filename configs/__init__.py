"""Presets: files that each end in `CONFIG = Config(...)`, found by name. A copy in any folder works as well, by its path."""
