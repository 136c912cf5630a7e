"""Making a judge head: reading labelled answers with the target, fitting the head, measuring it."""
