"""Using what was trained: opening run folders."""
