"""What fits, how, and how fast, before a node is booked."""
