"""`duet chat`: a chat at a terminal, in which drafts are seen before the target has confirmed them."""
