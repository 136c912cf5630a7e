"""`duet-cloud plan`: from measured tables to GPUs and cost."""
