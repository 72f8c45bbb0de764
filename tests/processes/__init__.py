"""Real servers and agents in processes of their own, which tests start, kill and start again."""
