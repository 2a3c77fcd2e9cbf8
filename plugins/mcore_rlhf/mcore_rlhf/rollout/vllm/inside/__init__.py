"""Modules that vLLM imports, in its own processes and Python: they import nothing of mcore."""
