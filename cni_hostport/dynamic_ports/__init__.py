"""Dynamic host ports: a pod asks for them explicitly, and they are picked from ranges that the network allows."""
