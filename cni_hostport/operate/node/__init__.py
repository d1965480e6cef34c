"""What keeps this plugin on a node of a cluster: its installation, its network configuration, and its agent."""
