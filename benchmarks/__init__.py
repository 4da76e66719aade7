"""One script per claim about speed or size: a table for people, then one JSON object as the last line."""
