"""Drafts cut from a target: its first blocks, and a trained adapter (Kangaroo, arXiv:2404.18911)."""
