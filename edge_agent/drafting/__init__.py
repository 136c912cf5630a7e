"""Who proposes tokens at the edge."""
