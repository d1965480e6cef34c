"""What a person runs: commands that show, explain, check and repair the host ports of a node.

None of this is imported when a container runtime calls the plugin.
"""
