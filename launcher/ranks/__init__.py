"""The processes of one training: what they tell each other, and how they end."""
