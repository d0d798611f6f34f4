"""Faults and hostile input: what is tried, what is survived, and that nothing is lost."""
