"""What runs inside the peers' environments, as their users would write it; imports nothing of ours."""
