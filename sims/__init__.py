"""Thin programs over fedkd_jax: they parse, build, call the library and write. Only they do I/O."""
