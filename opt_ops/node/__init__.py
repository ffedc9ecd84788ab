"""What runs on a node: the agent, the ranks it starts, readings of GPU and host, burn-in."""
