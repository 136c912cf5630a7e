"""`duet serve`: OpenAI's API over the agent, and the web page."""
