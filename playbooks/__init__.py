"""One page per failure class: people read it, the policy executes it. `playbooks.loader` checks and loads them."""
