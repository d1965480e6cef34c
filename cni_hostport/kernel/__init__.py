"""What is asked of this machine: nf_tables, connection tracking, interfaces, routes, network namespaces, processes."""
