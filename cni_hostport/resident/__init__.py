"""The resident process, which makes calls faster: its children, whom it serves, and what code it runs."""
