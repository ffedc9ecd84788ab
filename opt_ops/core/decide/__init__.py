"""What is done about a state: rules, playbook ladders, capacity, alerts, proofs."""
