"""The version of softcache, in a file of its own: what lies below the package's public names asks for it too."""

__version__ = "0.9.0"
