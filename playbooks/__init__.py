"""One page per failure class: people read it, the policy executes it. `opt_ops.playbook_loader` loads them."""
