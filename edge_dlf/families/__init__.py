"""From the name of a family to its members in memory."""
