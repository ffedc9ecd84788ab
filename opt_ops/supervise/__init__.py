"""What runs in the daemon: watchers observe, the core decides, the executor acts."""
