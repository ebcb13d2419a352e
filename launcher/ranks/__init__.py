"""What the processes of one training do together, and how they end."""
