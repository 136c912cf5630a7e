"""The pure core that both sides share; `llama`, `models` and `settings` stand apart and do I/O."""
