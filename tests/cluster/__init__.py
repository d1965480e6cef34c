"""Tests on a Kubernetes cluster; a package, for the cluster to end with the last of them."""
